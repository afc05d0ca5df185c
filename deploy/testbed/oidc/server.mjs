// A certified OpenID provider (oidc-provider) as a process of its own, for
// tests: node server.mjs CONFIG.json. It keeps everything in memory, signs
// anybody in who is in its configuration, and is good for nothing else.
//
// Its configuration is what OIDCConfig in ../oidc.go writes. It prints one line
// of JSON, {"ready":true,"issuer":…,"port":…}, when it serves.
import { generateKeyPairSync, randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import Provider, { errors, interactionPolicy } from 'oidc-provider';

const config = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const accounts = new Map(config.accounts.map((a) => [a.sub, a]));
const { Check, base } = interactionPolicy;

// Voluntary acr_values are not acted upon by the library; a provider that knows
// the classes asks again.
const policy = base();
policy.get('login').checks.add(new Check('acr_values', 'another authentication is asked for', (ctx) => {
  const asked = (ctx.oidc.params.acr_values ?? '').split(' ').filter(Boolean);
  if (!asked.length || asked.includes(ctx.oidc.acr) || ctx.oidc.result?.login) return Check.NO_NEED_TO_PROMPT;
  return Check.REQUEST_PROMPT;
}));

const key = (type, options, alg) => ({
  ...generateKeyPairSync(type, options).privateKey.export({ format: 'jwk' }), alg, use: 'sig', kid: `${alg}-1`,
});

function provider(issuer) {
  const p = new Provider(issuer, {
    clients: config.clients.map((c) => ({
      client_id: c.id,
      ...(c.secret
        ? { client_secret: c.secret, token_endpoint_auth_method: 'client_secret_basic' }
        : { token_endpoint_auth_method: 'none' }),
      redirect_uris: c.redirect_uris ?? [],
      response_types: c.redirect_uris?.length ? ['code'] : [],
      grant_types: [...(c.redirect_uris?.length ? ['authorization_code'] : []), 'urn:ietf:params:oauth:grant-type:device_code'],
      id_token_signed_response_alg: c.alg || 'RS256',
    })),
    jwks: { keys: [key('rsa', { modulusLength: 2048 }, 'RS256'), key('ec', { namedCurve: 'P-256' }, 'ES256')] },
    enabledJWA: { idTokenSigningAlgValues: ['RS256', 'ES256'] },
    cookies: { keys: [randomBytes(32).toString('hex')] },
    scopes: ['openid', 'email', 'profile', 'groups'],
    claims: { openid: ['sub'], email: ['email', 'email_verified'], profile: ['name', 'preferred_username'], groups: ['groups'] },
    acrValues: config.acr ?? [],
    // As the standard has it: what scopes ask for is at the userinfo endpoint.
    conformIdTokenClaims: !config.claims_in_id_token,
    pkce: { required: () => true },
    ttl: { AccessToken: 300, AuthorizationCode: 60, DeviceCode: 600, Grant: 3600, IdToken: 300, Interaction: 600, Session: 3600 },
    interactions: { policy, url: (_ctx, interaction) => `/interaction/${interaction.uid}` },
    features: {
      devInteractions: { enabled: false },
      deviceFlow: { enabled: true, mask: '****-****' },
      claimsParameter: { enabled: true },
      resourceIndicators: {
        enabled: true,
        async getResourceServerInfo(_ctx, resource) {
          if (!config.audiences?.includes(resource)) throw new errors.InvalidTarget();
          return { scope: 'openid', audience: resource, accessTokenFormat: 'jwt', accessTokenTTL: 300, jwt: { sign: { alg: 'ES256' } } };
        },
      },
    },
    findAccount: (_ctx, sub) => accounts.has(sub) && { accountId: sub, claims: () => accounts.get(sub) },
    // What a broker needs to know of whoever shows the token (RFC 9068, section 2.2).
    extraTokenClaims(ctx, token) {
      const a = accounts.get(token.accountId);
      const code = ctx.oidc.entities.AuthorizationCode ?? ctx.oidc.entities.DeviceCode;
      return a && { email: a.email, email_verified: a.email_verified, groups: a.groups, auth_time: code?.authTime, acr: code?.acr };
    },
    // Nobody is asked for consent.
    async loadExistingGrant(ctx) {
      const id = ctx.oidc.result?.consent?.grantId ?? ctx.oidc.session.grantIdFor(ctx.oidc.client.clientId);
      const grant = (id && await ctx.oidc.provider.Grant.find(id))
        || new ctx.oidc.provider.Grant({ clientId: ctx.oidc.client.clientId, accountId: ctx.oidc.session.accountId });
      if (grant.accountId !== ctx.oidc.session.accountId) return undefined;
      grant.addOIDCScope('openid email profile groups');
      grant.addOIDCClaims(['email', 'email_verified', 'name', 'preferred_username', 'groups']);
      for (const audience of config.audiences ?? []) grant.addResourceScope(audience, 'openid');
      await grant.save();
      return grant;
    },
    renderError(ctx, out) {
      ctx.type = 'html';
      ctx.body = page(`<h1>${text(out.error)}</h1><p>${text(out.error_description ?? '')}</p>`);
    },
  });
  return p;
}

const text = (s) => String(s).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const page = (body) => `<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Test provider</title><body>${body}</body></html>`;

// The login page. "ago" has the person sign in so many seconds earlier, so that
// a test of max_age needs no waiting.
const login = (uid) => page(`<h1>Sign in</h1><form method="post" action="/interaction/${uid}">
<label>Account <select name="person">${config.accounts.map((a) => `<option value="${text(a.sub)}">${text(a.email ?? a.sub)}</option>`).join('')}</select></label>
<label>Class <select name="acr"><option value=""></option>${(config.acr ?? []).map((a) => `<option>${text(a)}</option>`).join('')}</select></label>
<label>Seconds ago <input name="ago" value="0"></label>
<button name="how" value="in">Sign in</button><button name="how" value="deny">Refuse</button></form>`);

async function interaction(p, req, res) {
  const { uid, prompt } = await p.interactionDetails(req, res);
  if (prompt.name !== 'login') {
    return p.interactionFinished(req, res, { error: 'access_denied', error_description: `prompt ${prompt.name}` });
  }
  if (req.method !== 'POST') {
    res.setHeader('Content-Type', 'text/html; charset=utf-8');
    return res.end(login(uid));
  }
  const chunks = [];
  for await (const chunk of req) chunks.push(chunk);
  const form = new URLSearchParams(Buffer.concat(chunks).toString());
  if (form.get('how') === 'deny') return p.interactionFinished(req, res, { error: 'access_denied' });
  return p.interactionFinished(req, res, {
    login: {
      accountId: form.get('person'),
      acr: form.get('acr') || undefined,
      ts: Math.floor(Date.now() / 1000) - Number(form.get('ago') || 0),
    },
  });
}

const server = createServer();
server.listen(config.port ?? 0, '127.0.0.1', () => {
  const { port } = server.address();
  const issuer = `http://127.0.0.1:${port}`;
  const p = provider(issuer);
  const callback = p.callback();
  server.on('request', (req, res) => {
    if (!req.url.startsWith('/interaction/') || req.url.split('/').length !== 3) return callback(req, res);
    return interaction(p, req, res).catch((err) => {
      console.error(err);
      res.statusCode = 400;
      res.end(page(`<h1>${text(err.error ?? 'error')}</h1>`));
    });
  });
  console.log(JSON.stringify({ ready: true, issuer, port }));
});
for (const signal of ['SIGTERM', 'SIGINT']) process.on(signal, () => process.exit(0));
