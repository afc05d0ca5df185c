// An independent judge of AWS policies: reads one simulation a line from stdin,
// and writes one verdict a line. It runs as a process of its own, in
// development alone.
import { createInterface } from 'node:readline'
import { runSimulation } from '@cloud-copilot/iam-simulate'

for await (const line of createInterface({ input: process.stdin })) {
  const { principal, action, resource, context, sessionPolicy, identityPolicies, boundary, resourcePolicy } = JSON.parse(line)
  const simulation = {
    request: { principal, action, resource: { resource, accountId: '123456789012' }, contextVariables: context },
    sessionPolicy: sessionPolicy ? JSON.parse(sessionPolicy) : undefined,
    identityPolicies: identityPolicies.map((text, i) => ({ name: `p${i}`, policy: JSON.parse(text) })),
    serviceControlPolicies: [],
    resourceControlPolicies: [],
    permissionBoundaryPolicies: boundary ? [{ name: 'boundary', policy: JSON.parse(boundary) }] : undefined,
    resourcePolicy: resourcePolicy ? JSON.parse(resourcePolicy) : undefined,
  }
  const got = await runSimulation(simulation, {})
  const verdict = got.resultType === 'error'
    ? { error: JSON.stringify(got.errors) }
    : { result: got.overallResult, ignored: got.result?.ignoredContextKeys ?? ['not told'] }
  process.stdout.write(JSON.stringify(verdict) + '\n')
}
