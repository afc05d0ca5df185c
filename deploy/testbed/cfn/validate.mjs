// Validates CloudFormation templates offline, with AWS's schemas of resources
// and cfn-lint's rules: validate.mjs TEMPLATE... Prints a line of JSON for each:
// what was found but advice (INFO), and how much was looked at.
import { CelEngine, TemplateFile } from '@aws/cloudformation-validate'

const engine = new CelEngine()
for (const path of process.argv.slice(2)) {
  const { diagnostics, metadata } = engine.validateStandard(new TemplateFile(path), { severityLevel: 'WARN' })
  console.log(JSON.stringify({
    rules: metadata.rulesEvaluated,
    resources: metadata.resourcesScanned,
    findings: diagnostics.map((d) => ({ rule: d.ruleId, severity: d.severity, message: d.message, line: d.startLine })),
  }))
}
engine.free()
