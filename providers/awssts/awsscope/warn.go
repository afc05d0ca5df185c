package awsscope

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// escalations are actions with which a session can come to do more than its
// tool says, by something else that does it for it.
var escalations = map[string]string{
	"lambda:updatefunctioncode":                       "code of its choice runs with the function's role",
	"lambda:updatefunctionconfiguration":              "layers and variables of its choice run with the function's role",
	"lambda:addpermission":                            "others may be allowed to call the function",
	"lambda:createfunction":                           "with iam:PassRole that somebody else gives, code runs with another role",
	"ssm:sendcommand":                                 "commands run with the instance's role",
	"ssm:startsession":                                "a shell runs with the instance's role, and stays open",
	"ssm:startautomationexecution":                    "an automation may run with another role",
	"ec2:modifyinstanceattribute":                     "user data runs with the instance's role at its next start",
	"ec2:replaceiaminstanceprofileassociation":        "an instance gets another role",
	"ec2-instance-connect:sendsshpublickey":           "a shell runs with the instance's role, and stays open",
	"ecs:executecommand":                              "a shell runs with the task's role, and stays open",
	"ecs:runtask":                                     "containers run with the task's role",
	"ecs:registertaskdefinition":                      "containers of its choice run with a task's role",
	"codebuild:startbuild":                            "a build of its choice runs with the project's role",
	"codebuild:updateproject":                         "a build of its choice runs with the project's role",
	"codepipeline:updatepipeline":                     "a pipeline of its choice runs with its role",
	"cloudformation:createstack":                      "a stack makes what its role may make",
	"cloudformation:updatestack":                      "a stack makes what its role may make",
	"cloudformation:createchangeset":                  "a stack makes what its role may make",
	"cloudformation:executechangeset":                 "a stack makes what its role may make",
	"glue:updatejob":                                  "a job of its choice runs with its role",
	"glue:startjobrun":                                "a job runs with its role",
	"glue:updatedevendpoint":                          "a shell runs with the endpoint's role",
	"sagemaker:createpresignednotebookinstanceurl":    "a notebook runs with its role, and stays open",
	"states:updatestatemachine":                       "a state machine of its choice runs with its role",
	"events:puttargets":                               "events call what the rule's role may call",
	"scheduler:createschedule":                        "a schedule calls things after the lease has ended",
	"datapipeline:putpipelinedefinition":              "a pipeline of its choice runs with its role",
	"s3:putbucketpolicy":                              "the bucket may be opened to others, for good",
	"s3:putbucketacl":                                 "the bucket may be opened to others, for good",
	"s3:putobjectacl":                                 "objects may be opened to others, for good",
	"s3:putaccesspointpolicy":                         "the bucket may be opened to others, for good",
	"s3:putreplicationconfiguration":                  "objects are copied elsewhere after the lease has ended",
	"kms:creategrant":                                 "a grant lets others use the key after the lease has ended",
	"kms:putkeypolicy":                                "the key may be opened to others, for good",
	"secretsmanager:putresourcepolicy":                "the secret may be opened to others, for good",
	"secretsmanager:getsecretvalue":                   "what the secret opens stays open after the lease has ended",
	"ssm:getparameter":                                "a secret in the parameter stays known after the lease has ended",
	"sqs:addpermission":                               "the queue may be opened to others, for good",
	"sqs:setqueueattributes":                          "the queue's policy may be opened to others, for good",
	"sns:addpermission":                               "the topic may be opened to others, for good",
	"sns:settopicattributes":                          "the topic's policy may be opened to others, for good",
	"sns:subscribe":                                   "messages are sent elsewhere after the lease has ended",
	"ecr:setrepositorypolicy":                         "the repository may be opened to others, for good",
	"ecr:putimage":                                    "an image of its choice runs wherever the repository is used",
	"eks:accesskubernetesapi":                         "the cluster's own permissions decide what it can do there",
	"eks:createaccessentry":                           "others are let into the cluster, for good",
	"rds-db:connect":                                  "connections to the database stay open after the lease has ended",
	"redshift:getclustercredentials":                  "a login of the cluster outlives the lease",
	"cognito-identity:getcredentialsforidentity":      "sessions of another role are made, which the lease's end does not reach",
	"codeartifact:getauthorizationtoken":              "a token outlives the lease",
	"ecr:getauthorizationtoken":                       "a token of up to 12 hours outlives the lease",
	"s3express:createsession":                         "a token for the bucket outlives the lease by up to 5 minutes",
	"s3:getdataaccess":                                "sessions of another role are made, which the lease's end does not reach",
	"lakeformation:getdataaccess":                     "sessions for the data are made, which the lease's end does not reach",
	"lakeformation:gettemporarygluetablecredentials":  "sessions for the data are made, which the lease's end does not reach",
	"datazone:getenvironmentcredentials":              "sessions of another role are made, which the lease's end does not reach",
	"redshift:getclustercredentialswithiam":           "a login of the cluster outlives the lease",
	"redshift-serverless:getcredentials":              "a login of the workgroup outlives the lease",
	"secretsmanager:batchgetsecretvalue":              "what the secrets open stays open after the lease has ended",
	"ssm:getparameters":                               "secrets in the parameters stay known after the lease has ended",
	"ssm:getparametersbypath":                         "secrets in the parameters stay known after the lease has ended",
	"dsql:dbconnect":                                  "connections to the database stay open after the lease has ended",
	"dsql:dbconnectadmin":                             "connections to the database stay open after the lease has ended",
	"elasticache:connect":                             "connections to the cache stay open after the lease has ended",
	"memorydb:connect":                                "connections to the database stay open after the lease has ended",
	"kafka-cluster:connect":                           "connections to the cluster stay open after the lease has ended",
	"ecr-public:getauthorizationtoken":                "a token of up to 12 hours outlives the lease",
	"sso:getrolecredentials":                          "sessions of another role are made, which the lease's end does not reach",
	"organizations:attachpolicy":                      "what accounts may do changes",
	"lakeformation:grantpermissions":                  "others get at the data, for good",
	"dynamodb:putresourcepolicy":                      "the table may be opened to others, for good",
	"backup:putbackupvaultaccesspolicy":               "backups may be opened to others, for good",
	"ec2:modifysnapshotattribute":                     "snapshots may be shared with others, for good",
	"ec2:modifyimageattribute":                        "images may be shared with others, for good",
	"rds:modifydbsnapshotattribute":                   "snapshots may be shared with others, for good",
	"rolesanywhere:createprofile":                     "others may come to have sessions of roles",
	"bedrock-agentcore:createcodeinterpreter":         "code of its choice runs with the interpreter's role",
	"apprunner:updateservice":                         "code of its choice runs with the service's role",
	"elasticmapreduce:addjobflowsteps":                "steps run with the cluster's role",
	"batch:submitjob":                                 "a job runs with its role",
	"imagebuilder:createimage":                        "a build runs with its role",
	"greengrass:createdeployment":                     "code runs with the devices' role",
	"servicecatalog:provisionproduct":                 "a product makes what its launch role may make",
	"autoscaling:createlaunchconfiguration":           "instances of its choice run with a role",
	"ec2:createlaunchtemplateversion":                 "instances of its choice run with the template's role",
	"elasticbeanstalk:updateenvironment":              "code of its choice runs with the environment's role",
	"codestar-connections:useconnection":              "somebody else's access to repositories is used",
	"iot:createrolealias":                             "devices get sessions of a role",
	"cloudtrail:stoplogging":                          "what it does is seen no more",
	"cloudtrail:deletetrail":                          "what it does is seen no more",
	"guardduty:deletedetector":                        "what it does is seen no more",
	"logs:putsubscriptionfilter":                      "logs are sent elsewhere after the lease has ended",
	"lambda:createeventsourcemapping":                 "events call a function after the lease has ended",
	"lambda:invokefunction":                           "the function does what its role may do, with input of its choice",
	"lambda:createfunctionurlconfig":                  "others may be allowed to call the function",
	"states:startexecution":                           "the state machine does what its role may do, with input of its choice",
	"ssm:createassociation":                           "commands run with the instances' roles, again and again",
	"ssm:resumesession":                               "a shell runs with the instance's role, and stays open",
	"ecs:starttask":                                   "containers run with the task's role",
	"ecs:updateservice":                               "containers run with the task's role after the lease has ended",
	"codebuild:startbuildbatch":                       "builds of its choice run with the project's role",
	"sagemaker:createpresigneddomainurl":              "a studio runs with its role, and stays open",
	"ec2:getpassworddata":                             "a login of the instance outlives the lease",
	"ec2:authorizesecuritygroupingress":               "the network is opened to others, for good",
	"rds:modifydbinstance":                            "a password of its choice outlives the lease",
	"rds:modifydbcluster":                             "a password of its choice outlives the lease",
	"cognito-idp:adminsetuserpassword":                "a login of its choice outlives the lease",
	"route53:changeresourcerecordsets":                "names lead elsewhere, and certificates can be had for them, for good",
	"transfer:createuser":                             "a login of its own outlives the lease",
	"lightsail:downloaddefaultkeypair":                "a key outlives the lease",
	"opsworks:createstack":                            "a stack runs with a role",
	"cloud9:createenvironmentmembership":              "others get into an environment that runs with a user's rights",
	"appstream:createstreamingurl":                    "a session that is open outlives the lease",
	"connect:createuser":                              "a login of its own outlives the lease",
	"quicksight:registeruser":                         "a login of its own outlives the lease",
	"workspaces:createworkspaces":                     "a desktop of its own outlives the lease",
	"glue:createdevendpoint":                          "a shell runs with a role",
	"sagemaker:createnotebookinstancelifecycleconfig": "code of its choice runs with a notebook's role",
}

// wholeKind is the last part of an ARN that means every resource of a kind, such
// as table/* and secret:*.
var wholeKind = regexp.MustCompile(`^[A-Za-z0-9-]+[/:][*?/:]*\*$`)

// Warnings say what a tool can do in the end, and what is to be known of it
// before it is used. Nothing is asked of anybody.
func (s Scope) Warnings(c Config) []providers.Finding {
	var all []providers.Finding
	note := func(fix, format string, args ...any) {
		all = append(all, providers.Finding{Message: fmt.Sprintf(format, args...), Fix: fix})
	}
	note("", "%s", s.frame())
	for i, each := range s.Statements {
		at := fmt.Sprintf("statement %d", i)
		if each.Sid != "" {
			at = "statement " + each.Sid
		}
		note("", "%s: %s", at, each.words())
		if each.Effect == allow {
			each.warn(at, note)
		}
	}
	for _, arn := range s.PolicyARNs {
		note("write statements, which the catalog fixes", "everything that %s allows, and its role: the policy may change without the catalog", arn)
		switch name := arn[strings.LastIndexByte(arn, '/')+1:]; {
		case name == "ReadOnlyAccess":
			note("write statements, or take a service's own policy", "%s reads nearly everything in the account", arn)
		case strings.HasSuffix(name, "FullAccess"), strings.HasPrefix(name, "AdministratorAccess"):
			note("write statements for what the tool is for", "%s gives, by its name, everything of a service", arn)
		}
	}
	if !s.compatible {
		note("in resource policies, name the role and not its sessions' ARNs, and allow nobody by * with a condition on aws:PrincipalArn",
			"a resource policy (of a bucket, a key, a queue) that allows the role's session by its ARN, or everybody, gives more than the statements say, and more than the role's boundary; only explicit denies, such as the lease's end, hold against it")
	}
	return all
}

// frame says what bounds the statements: whose sessions the leases are, what the
// parameters may be, and how much room is left.
func (s Scope) frame() string {
	var parts []string
	what := "the statements"
	if s.PolicyARNs != nil {
		what = "the policies"
	}
	switch n := len(s.Roles); {
	case s.compatible:
		parts = append(parts, "its leases can do what the statements and the provider's own keys both allow")
	case n == 1:
		parts = append(parts, fmt.Sprintf("its leases are sessions of %s, and can do what %s and the role both allow", s.Roles[0].ARN, what))
	default:
		parts = append(parts, fmt.Sprintf("its leases are sessions of %d roles (%s, …), and can do what %s and the role both allow", n, s.Roles[0].ARN, what))
	}
	for _, p := range s.params {
		switch {
		case p.Type == broker.ParamString && len(p.OneOf) > 0:
			parts = append(parts, fmt.Sprintf("%s is one of %s", p.Name, strings.Join(p.OneOf, ", ")))
		case p.Type == broker.ParamString && p.Pattern != nil:
			whole := strings.TrimSuffix(strings.TrimPrefix(p.Pattern.String(), "^(?:"), ")$")
			parts = append(parts, fmt.Sprintf("%s matches %s", p.Name, whole))
		case p.Type == broker.ParamInteger && p.Min != nil && p.Max != nil:
			parts = append(parts, fmt.Sprintf("%s is from %d to %d", p.Name, *p.Min, *p.Max))
		default:
			parts = append(parts, fmt.Sprintf("%s is any %s", p.Name, p.Type))
		}
	}
	if policy, err := s.Largest(time.Unix(0, 0)); err == nil {
		parts = append(parts, fmt.Sprintf("the session policy takes up to %d of %d characters", len([]rune(policy)), MaxPolicy))
	}
	return strings.Join(parts, "; ")
}

// warn tells what is wide in a statement that allows.
func (s Statement) warn(at string, note func(fix, format string, args ...any)) {
	for _, a := range s.Action {
		if strings.ContainsAny(a, "*?") {
			note("name the actions one by one", "%s has the wildcard %s: actions that AWS adds later are in it, too", at, a)
		}
		var more []string
		for _, known := range slices.Sorted(maps.Keys(escalations)) {
			if matches(strings.ToLower(a), known) {
				more = append(more, known+" ("+escalations[known]+")")
			}
		}
		if len(more) > 0 {
			note("leave it out, or bound the resource to what may be reached by it", "%s: with %s more can be done than the tool says: %s", at, a, strings.Join(more, "; "))
		}
	}
	const beside = "put a separator between them, such as /"
	for _, r := range s.Resource {
		if r == "*" {
			note("name the resources, unless the actions know none", "%s is for every resource (*)", at)
			continue
		}
		parts := strings.SplitN(r, ":", 6)
		if strings.ContainsAny(strings.Join(parts[3:5], ""), "*?") {
			note("name region and account", "%s: %s is for any region or account", at, r)
		}
		if strings.Contains(parts[5], "}*") {
			note(beside, "%s: in %s a parameter stands right before *: the value a reaches what is named ab, too", at, r)
		}
		bucket, _, _ := strings.Cut(parts[5], "/")
		switch {
		case strings.HasPrefix(parts[5], "*"), strings.HasPrefix(parts[5], "?"), wholeKind.MatchString(parts[5]) && parts[2] != "s3":
			note("name the resources", "%s: %s is for every resource of its kind", at, r)
		case parts[2] == "s3" && strings.ContainsAny(strings.ReplaceAll(bucket, "${*}", ""), "*?"):
			note("name the buckets", "%s: %s is for every bucket whose name fits, of whatever account", at, r)
		case parts[2] == "s3" && strings.Contains(bucket, reference) && !s.sameAccount():
			note("name the bucket, or add the condition aws:ResourceAccount", "%s: in %s a parameter names the bucket, which may be of another account", at, r)
		}
	}
	for _, operator := range slices.Sorted(maps.Keys(s.Condition)) {
		if strings.HasPrefix(operator, "ForAllValues:") || strings.HasSuffix(operator, "IfExists") {
			note("add a condition Null with false for the key, unless that is meant", "%s: %s holds where a request has no such key at all, too", at, operator)
		}
		for _, key := range slices.Sorted(maps.Keys(s.Condition[operator])) {
			for _, v := range s.Condition[operator][key] {
				if strings.Contains(operator, "Like") && strings.Contains(v, "}*") {
					note(beside, "%s: in the condition on %s a parameter stands right before *: the value a fits what is named ab, too", at, key)
				}
			}
		}
	}
}

// sameAccount reports whether the statement is for resources of some account alone.
func (s Statement) sameAccount() bool {
	for _, keys := range s.Condition {
		for key := range keys {
			if strings.EqualFold(key, "aws:ResourceAccount") || strings.EqualFold(key, "s3:ResourceAccount") {
				return true
			}
		}
	}
	return false
}

// words tell a statement to people.
func (s Statement) words() string {
	verb, actions, resources := "may", s.Action, s.Resource
	var not string
	if s.Effect == deny {
		verb = "may not"
	}
	if s.NotAction != nil {
		actions, not = s.NotAction, "anything but "
	}
	text := fmt.Sprintf("%s %s%s", verb, not, strings.Join(actions, ", "))
	if s.NotResource != nil {
		text += " on anything but " + strings.Join(s.NotResource, ", ")
	} else {
		text += " on " + strings.Join(resources, ", ")
	}
	var conditions []string
	for _, operator := range slices.Sorted(maps.Keys(s.Condition)) {
		for _, key := range slices.Sorted(maps.Keys(s.Condition[operator])) {
			conditions = append(conditions, fmt.Sprintf("%s %s %s", key, operator, strings.Join(s.Condition[operator][key], " or ")))
		}
	}
	if len(conditions) > 0 {
		text += ", if " + strings.Join(conditions, " and ")
	}
	return text
}
