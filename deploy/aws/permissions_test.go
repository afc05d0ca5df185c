package aws

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// caller is who asks AWS for something.
type caller int

const (
	theBroker  caller = iota // a session of the broker's role
	theTool                  // a session of the tool's role, with what the role has
	theTaken                 // one that a broker which was taken over made: its policy is not bounded, and everything was put into the role
	theIssuer                // whoever has a JWT of the issuer's
	theForeign               // a session of another role, which may do everything
)

// trial is something that is asked of AWS, and whether it may be.
type trial struct {
	who              caller
	action, resource string
	context          map[string]string
	trust            string // of the resource, a role: empty is that of the template
	widened          bool   // by an operator: the boundary allows everything else
	may              bool
}

const (
	everything = `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"*","Resource":"*"}]}`
	foreignARN = "arn:aws:iam::" + accountID + ":role/admin"
	objects    = "arn:aws:s3:::" + bucket + "/acme/1"
	otherARN   = "arn:aws:secretsmanager:" + region + ":" + accountID + ":secret:other-MnOpQr"
	userARN    = "arn:aws:iam::" + accountID + ":user/mallory"
	// known is an issuer whose claims the judge knows as keys of conditions; it
	// ignores those of ours.
	known    = "accounts.google.com"
	knownARN = "arn:aws:iam::" + accountID + ":oidc-provider/" + known
	// trusting is the trust policy of a role that trusts the sessions of the
	// tool by their own ARN.
	trusting = `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":{"AWS":"arn:aws:sts::` + accountID + `:assumed-role/crm/l1"},"Action":"sts:*"}]}`
)

func (c trial) String() string {
	who := map[caller]string{theBroker: "the broker", theTool: "the tool", theTaken: "a tool of a broker that was taken over", theIssuer: "the issuer", theForeign: "another role"}[c.who]
	text := fmt.Sprintf("%s: %s on %s with %v", who, c.action, c.resource, c.context)
	if c.widened {
		text += ", the boundary widened"
	}
	return text
}

// question puts a trial to the judge, with the documents of an account.
func (c trial) question(t *testing.T, a account) simulation {
	q := simulation{Action: c.action, Resource: c.resource, Context: maps.Clone(c.context), ResourcePolicy: c.trust, IdentityPolicies: []string{}}
	if q.Context == nil {
		q.Context = map[string]string{}
	}
	if r, ok := a.Roles[c.resource]; ok && q.ResourcePolicy == "" && strings.HasPrefix(c.action, "sts:") {
		q.ResourcePolicy = r.Trust
	}
	session := func(name string) string { return "arn:aws:sts::" + accountID + ":assumed-role/" + name }
	switch c.who {
	case theBroker:
		q.Principal, q.IdentityPolicies = session("mayfly-broker/mayfly"), slices.Collect(maps.Values(a.Roles[brokerARN].Inline))
	case theTool, theTaken:
		q.Principal = session("crm/l1")
		for _, arn := range a.Roles[crmARN].Managed {
			q.IdentityPolicies = append(q.IdentityPolicies, a.Policies[arn])
		}
		q.Boundary = a.Policies[a.Roles[crmARN].Boundary]
		if c.who == theTaken {
			q.IdentityPolicies = append(q.IdentityPolicies, everything)
		}
		if c.widened {
			d := parse(t, q.Boundary)
			d["Statement"] = append(d["Statement"].([]any), map[string]any{"Effect": "Allow", "Action": "*", "Resource": "*"})
			q.Boundary = jsonOf(t, d)
		}
	case theIssuer:
		q.Principal = knownARN
	case theForeign:
		q.Principal, q.IdentityPolicies = session("admin/mallory"), []string{everything}
	}
	return q
}

// boundaryIs is the context of an action on a role with that boundary.
func boundaryIs(arn string) map[string]string {
	return map[string]string{"iam:PermissionsBoundary": arn}
}

// calls are what the drivers do at AWS, by the operation of AWS's SDK: whatever
// they ask for, the templates are to allow.
func calls() map[string][]trial {
	bound := boundaryIs(boundaryARN)
	return map[string][]trial{
		"sts.AssumeRole": {
			{who: theBroker, action: "sts:AssumeRole", resource: crmARN},
			{who: theBroker, action: "sts:TagSession", resource: crmARN, context: map[string]string{"aws:RequestTag/mayfly-tool": "crm"}},
			{who: theBroker, action: "sts:SetSourceIdentity", resource: crmARN, context: map[string]string{"sts:SourceIdentity": "a1"}},
		},
		"sts.GetCallerIdentity":          nil, // AWS answers it to everybody, in spite of every deny
		"sts.DecodeAuthorizationMessage": {{who: theTool, action: "sts:DecodeAuthorizationMessage", resource: "*"}},
		"iam.ListRolePolicies":           {{who: theBroker, action: "iam:ListRolePolicies", resource: crmARN}},
		"iam.GetRolePolicy":              {{who: theBroker, action: "iam:GetRolePolicy", resource: crmARN}},
		"iam.GetRole":                    {{who: theBroker, action: "iam:GetRole", resource: crmARN}}, // for a live check alone
		"iam.PutRolePolicy":              {{who: theBroker, action: "iam:PutRolePolicy", resource: crmARN, context: bound}},
		"iam.DeleteRolePolicy":           {{who: theBroker, action: "iam:DeleteRolePolicy", resource: crmARN, context: bound}},
		"secretsmanager.GetSecretValue": {
			{who: theBroker, action: "secretsmanager:GetSecretValue", resource: secret},
			{who: theBroker, action: "secretsmanager:GetSecretValue", resource: rotated},
		},
		"secretsmanager.DescribeSecret": {{who: theBroker, action: "secretsmanager:DescribeSecret", resource: rotated}},
		"secretsmanager.RotateSecret":   {{who: theBroker, action: "secretsmanager:RotateSecret", resource: rotated}},
	}
}

// trials are everything that is asked, allowed and not.
func trials() (all []trial) {
	for _, asked := range calls() {
		for _, c := range asked {
			c.may = true
			all = append(all, c)
		}
	}
	jwt := func(sub, aud string) map[string]string {
		return map[string]string{known + ":sub": sub, known + ":aud": aud}
	}
	login := func(context map[string]string) trial {
		return trial{who: theIssuer, action: "sts:AssumeRoleWithWebIdentity", resource: brokerARN, context: context}
	}
	ours := login(jwt(brokerID, audience))
	ours.may = true
	all = append(all, ours,
		trial{who: theTool, action: "s3:GetObject", resource: objects, may: true},
		trial{who: theTool, action: "s3:ListBucket", resource: "arn:aws:s3:::" + bucket, may: true})

	// Who may be the broker, and who a tool.
	all = append(all, login(jwt("spiffe://acme.test/agent", audience)), login(jwt(brokerID, "api.acme.test")), login(nil),
		login(map[string]string{known + ":sub": brokerID}), login(map[string]string{known + ":aud": audience}),
		trial{who: theIssuer, action: "sts:AssumeRoleWithWebIdentity", resource: crmARN, context: jwt(brokerID, audience)},
		trial{who: theForeign, action: "sts:AssumeRole", resource: brokerARN}, trial{who: theForeign, action: "sts:AssumeRole", resource: crmARN},
		trial{who: theTool, action: "sts:AssumeRole", resource: brokerARN}, trial{who: theTaken, action: "sts:AssumeRole", resource: brokerARN})

	// A role that trusts the broker by its ARN needs no word of the broker's own
	// policy; one that trusts the account does.
	everybody := strings.Replace(trusting, "arn:aws:sts::"+accountID+":assumed-role/crm/l1", "arn:aws:iam::"+accountID+":root", 1)
	for _, action := range []string{"sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity"} {
		all = append(all, trial{who: theBroker, action: action, resource: crmARN, trust: everybody, may: true})
	}

	// The broker beyond what it does.
	for _, resource := range []string{brokerARN, foreignARN, "arn:aws:iam::210987654321:role/mayfly/crm", "arn:aws:iam::" + accountID + ":role/mayflyer"} {
		for _, action := range []string{"sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity"} {
			all = append(all, trial{who: theBroker, action: action, resource: resource, trust: everybody})
		}
		for _, action := range []string{"iam:PutRolePolicy", "iam:DeleteRolePolicy", "iam:GetRolePolicy", "iam:ListRolePolicies", "iam:GetRole"} {
			c := trial{who: theBroker, action: action, resource: resource}
			if action == "iam:PutRolePolicy" || action == "iam:DeleteRolePolicy" {
				c.context = boundaryIs(boundaryARN)
			}
			all = append(all, c)
		}
	}
	for _, action := range []string{"iam:PutRolePolicy", "iam:DeleteRolePolicy"} {
		all = append(all, trial{who: theBroker, action: action, resource: crmARN}, // no boundary
			trial{who: theBroker, action: action, resource: crmARN, context: boundaryIs("arn:aws:iam::aws:policy/AdministratorAccess")})
	}
	for _, action := range []string{"iam:DeleteRolePermissionsBoundary", "iam:PutRolePermissionsBoundary", "iam:AttachRolePolicy", "iam:DetachRolePolicy", "iam:CreateRole"} {
		all = append(all, trial{who: theBroker, action: action, resource: crmARN, context: boundaryIs(boundaryARN)})
	}
	for _, action := range []string{"iam:UpdateAssumeRolePolicy", "iam:UpdateRole", "iam:DeleteRole", "iam:PassRole", "iam:TagRole"} {
		all = append(all, trial{who: theBroker, action: action, resource: crmARN})
	}
	for _, action := range []string{"iam:CreatePolicy", "iam:CreatePolicyVersion", "iam:SetDefaultPolicyVersion", "iam:DeletePolicy", "iam:DeletePolicyVersion"} {
		all = append(all, trial{who: theBroker, action: action, resource: boundaryARN})
	}
	for _, action := range []string{"iam:CreateUser", "iam:CreateAccessKey", "iam:PutUserPolicy", "iam:AttachUserPolicy"} {
		all = append(all, trial{who: theBroker, action: action, resource: userARN})
	}
	for _, action := range []string{"iam:AddClientIDToOpenIDConnectProvider", "iam:UpdateOpenIDConnectProviderThumbprint", "iam:DeleteOpenIDConnectProvider"} {
		all = append(all, trial{who: theBroker, action: action, resource: knownARN})
	}
	all = append(all,
		trial{who: theBroker, action: "sts:DecodeAuthorizationMessage", resource: "*"},
		trial{who: theBroker, action: "s3:GetObject", resource: objects},
		trial{who: theBroker, action: "secretsmanager:GetSecretValue", resource: otherARN},
		trial{who: theBroker, action: "secretsmanager:DescribeSecret", resource: secret},
		trial{who: theBroker, action: "secretsmanager:RotateSecret", resource: secret},
		trial{who: theBroker, action: "secretsmanager:PutSecretValue", resource: rotated},
		trial{who: theBroker, action: "secretsmanager:UpdateSecret", resource: rotated},
		trial{who: theBroker, action: "secretsmanager:DeleteSecret", resource: rotated},
		trial{who: theBroker, action: "secretsmanager:PutResourcePolicy", resource: rotated})

	// The boundary: what a broker that was taken over can bring about.
	all = append(all,
		trial{who: theTaken, action: "s3:GetObject", resource: objects, may: true},
		trial{who: theTaken, action: "s3:GetObject", resource: "arn:aws:s3:::other/1"},
		trial{who: theTaken, action: "s3:PutObject", resource: objects},
		trial{who: theTaken, action: "s3:PutBucketPolicy", resource: "arn:aws:s3:::" + bucket},
		trial{who: theTaken, action: "secretsmanager:GetSecretValue", resource: secret},
		// A role that trusts the session by its ARN needs no word of the boundary's; it is denied all the same.
		trial{who: theTaken, action: "sts:AssumeRole", resource: foreignARN, trust: trusting},
		trial{who: theTaken, action: "s3:PutObject", resource: objects, widened: true, may: true})
	for action, resource := range map[string]string{
		"iam:CreateUser": userARN, "iam:CreateAccessKey": userARN, "iam:PassRole": foreignARN, "iam:PutRolePolicy": crmARN, "iam:DeleteRolePermissionsBoundary": crmARN,
		"iam:UpdateAssumeRolePolicy": brokerARN, "iam:CreatePolicyVersion": boundaryARN, "sts:AssumeRole": foreignARN, "sts:AssumeRoot": "arn:aws:iam::210987654321:root",
		"sts:GetFederationToken": "arn:aws:sts::" + accountID + ":federated-user/mallory", "organizations:LeaveOrganization": "*", "account:CloseAccount": "arn:aws:account::" + accountID + ":account",
	} {
		c := trial{who: theTaken, action: action, resource: resource}
		if strings.HasPrefix(action, "sts:Assume") {
			c.trust = everybody
		}
		all = append(all, c)
		c.widened = true
		all = append(all, c)
	}
	return all
}

// TestPermissions: an independent simulator of IAM comes, with the templates'
// documents, to what is promised of them.
func TestPermissions(t *testing.T) {
	a, all := rendered(t, known, both), trials()
	var questions []simulation
	for _, c := range all {
		questions = append(questions, c.question(t, a))
	}
	may := 0
	for i, j := range judge(t, questions) {
		switch {
		case j.Error != "":
			t.Errorf("%s: %s", all[i], j.Error)
		case len(j.Ignored) > 0:
			t.Errorf("%s: the judge ignored %v", all[i], j.Ignored)
		case (j.Result == "Allowed") != all[i].may:
			t.Errorf("%s: the judge says %s", all[i], j.Result)
		}
		if all[i].may {
			may++
		}
	}
	t.Logf("%d cases: %d allowed, %d denied", len(all), may, len(all)-may)
}

func parse(t *testing.T, text string) (d map[string]any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestPermissionsAreNeeded: nothing of the templates' documents can be left out,
// and nothing is in them that is for nothing. Without any one statement, action,
// resource or condition the judge comes to something else in at least one case.
func TestPermissionsAreNeeded(t *testing.T) {
	type mutation struct {
		what    string
		account account
	}
	whole := rendered(t, known, both)
	var mutations []mutation
	// each makes the mutations of one document, and put puts one in its place.
	each := func(name, text string, put func(a account, text string)) {
		try := func(what string, change func(statements []any) []any) {
			d := parse(t, text)
			d["Statement"] = change(d["Statement"].([]any))
			a := account{Policies: maps.Clone(whole.Policies), Roles: maps.Clone(whole.Roles)}
			for arn, r := range a.Roles {
				r.Inline = maps.Clone(r.Inline)
				a.Roles[arn] = r
			}
			put(a, jsonOf(t, d))
			mutations = append(mutations, mutation{name + " without " + what, a})
		}
		statements := parse(t, text)["Statement"].([]any)
		for i, s := range statements {
			s := s.(map[string]any)
			if len(statements) > 1 {
				try(fmt.Sprintf("statement %d", i), func(all []any) []any { return slices.Delete(all, i, i+1) })
			}
			for _, field := range []string{"Action", "Resource"} {
				values, _ := s[field].([]any)
				for k, v := range values {
					try(fmt.Sprintf("%s %v of statement %d", field, v, i), func(all []any) []any {
						all[i].(map[string]any)[field] = slices.Delete(all[i].(map[string]any)[field].([]any), k, k+1)
						return all
					})
				}
			}
			conditions, _ := s["Condition"].(map[string]any)
			for operator, keys := range conditions {
				for key := range keys.(map[string]any) {
					try(fmt.Sprintf("%s %s of statement %d", operator, key, i), func(all []any) []any {
						operators := all[i].(map[string]any)["Condition"].(map[string]any)
						delete(operators[operator].(map[string]any), key)
						return all
					})
				}
			}
		}
	}
	for arn, text := range whole.Policies {
		each(arn, text, func(a account, text string) { a.Policies[arn] = text })
	}
	for arn, r := range whole.Roles {
		each("the trust policy of "+arn, r.Trust, func(a account, text string) {
			r := a.Roles[arn]
			r.Trust = text
			a.Roles[arn] = r
		})
		for name, text := range r.Inline {
			each(name+" of "+arn, text, func(a account, text string) { a.Roles[arn].Inline[name] = text })
		}
	}
	all := trials()
	var questions []simulation
	for _, m := range mutations {
		for _, c := range all {
			questions = append(questions, c.question(t, m.account))
		}
	}
	said := judge(t, questions)
	for i, m := range mutations {
		flipped := 0
		for k, c := range all {
			j := said[i*len(all)+k]
			if j.Error != "" {
				t.Fatalf("%s: %s: %s", m.what, c, j.Error)
			}
			if (j.Result == "Allowed") != c.may {
				flipped++
			}
		}
		if flipped == 0 {
			t.Errorf("%s: no case comes to anything else", m.what)
		}
	}
	t.Logf("%d mutations of %d cases", len(mutations), len(all))
	if len(mutations) < 30 {
		t.Errorf("only %d mutations", len(mutations))
	}
}

// TestEveryCallIsJudged: what the drivers ask of AWS, by the inputs of its SDK
// that they make, is what is judged.
func TestEveryCallIsJudged(t *testing.T) {
	made := map[string]bool{}
	for _, dir := range []string{"../../providers/awssts", "../../providers/secretsmanager", "../../providers/internal/awsclient"} {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no files in %s: %v", dir, err)
		}
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			services := map[string]string{} // by the name that the file has for its package
			for _, spec := range file.Imports {
				at, err := strconv.Unquote(spec.Path.Value)
				if err != nil {
					t.Fatal(err)
				}
				if service, ok := strings.CutPrefix(at, "github.com/aws/aws-sdk-go-v2/service/"); ok {
					local := path.Base(at)
					if spec.Name != nil {
						local = spec.Name.Name
					}
					services[local] = service
				}
			}
			ast.Inspect(file, func(n ast.Node) bool {
				if sel, ok := n.(*ast.SelectorExpr); ok {
					if x, ok := sel.X.(*ast.Ident); ok && services[x.Name] != "" {
						if operation, ok := strings.CutSuffix(sel.Sel.Name, "Input"); ok {
							made[services[x.Name]+"."+operation] = true
						}
					}
				}
				return true
			})
		}
	}
	have, judged := slices.Sorted(maps.Keys(made)), slices.Sorted(maps.Keys(calls()))
	if !slices.Equal(have, judged) {
		t.Errorf("the drivers call\n%v\nand judged are\n%v", have, judged)
	}
}
