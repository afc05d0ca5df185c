# Sets up one AWS account for Mayfly's driver awssts: the broker's own role, the
# boundary of what it can bring about, and one tool's role as an example.
# See docs/aws.md.
terraform {
  required_providers {
    aws = { source = "hashicorp/aws", version = ">= 5.81" } # the first that leaves the issuer's thumbprints to AWS
  }
}

variable "issuer" {
  description = "The issuer of the broker's JWT-SVIDs (SPIRE's OIDC discovery provider), without https://"
  type        = string
}

variable "broker_id" {
  description = "The broker's SPIFFE ID"
  type        = string
  default     = "spiffe://acme.test/mayfly"
}

variable "audience" {
  type    = string
  default = "sts.amazonaws.com"
}

variable "thumbprints" {
  description = "SHA-1 fingerprints of the CA of the issuer's certificate, to tell AWS which; where this is null, AWS looks by itself"
  type        = list(string)
  default     = null
}

variable "bucket" {
  description = "The bucket of the example's tool"
  type        = string
}

variable "secrets" {
  description = "The ARNs of the secrets that tools of the driver secretsmanager read"
  type        = list(string)
  default     = []
}

variable "rotated_secrets" {
  description = "Those of them that a lease's end rotates (rotate: true)"
  type        = list(string)
  default     = []
}

data "aws_caller_identity" "this" {}
data "aws_partition" "this" {}

locals {
  tool_roles = "arn:${data.aws_partition.this.partition}:iam::${data.aws_caller_identity.this.account_id}:role/mayfly/*"
  bucket     = "arn:${data.aws_partition.this.partition}:s3:::${var.bucket}"
}

resource "aws_iam_openid_connect_provider" "spire" {
  url             = "https://${var.issuer}"
  client_id_list  = [var.audience]
  thumbprint_list = var.thumbprints
}

# What the sessions of tools can do at most, whatever anybody writes into their
# roles: the broker may write policies of roles with this boundary only. Add
# what tools are for; leave out IAM and STS, and what gives others access, such
# as policies of buckets.
resource "aws_iam_policy" "boundary" {
  name = "mayfly-boundary"
  path = "/mayfly/"
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      { Effect = "Allow", Action = ["s3:GetObject", "s3:ListBucket"], Resource = [local.bucket, "${local.bucket}/*"] },
      { Effect = "Allow", Action = "sts:DecodeAuthorizationMessage", Resource = "*" },
      { Effect = "Deny", Action = ["iam:*", "sts:Assume*", "sts:GetFederationToken", "organizations:*", "account:*"], Resource = "*" },
    ]
  })
}

resource "aws_iam_role" "broker" {
  name                 = "mayfly-broker"
  max_session_duration = 3600
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Federated = aws_iam_openid_connect_provider.spire.arn }
      Action    = "sts:AssumeRoleWithWebIdentity"
      Condition = { StringEquals = { "${var.issuer}:sub" = var.broker_id, "${var.issuer}:aud" = var.audience } }
    }]
  })
}

resource "aws_iam_role_policy" "broker" {
  name = "leases"
  role = aws_iam_role.broker.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat([
      { Effect = "Allow", Action = ["sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity"], Resource = local.tool_roles },
      { Effect = "Allow", Action = ["iam:ListRolePolicies", "iam:GetRolePolicy"], Resource = local.tool_roles },
      # For "mayflyd check --live" alone.
      { Effect = "Allow", Action = "iam:GetRole", Resource = local.tool_roles },
      {
        Effect    = "Allow"
        Action    = ["iam:PutRolePolicy", "iam:DeleteRolePolicy"]
        Resource  = local.tool_roles
        Condition = { StringEquals = { "iam:PermissionsBoundary" = aws_iam_policy.boundary.arn } }
      },
      ],
      # IAM takes no statement without a resource.
      [for s in [
        { Effect = "Allow", Action = "secretsmanager:GetSecretValue", Resource = var.secrets },
        { Effect = "Allow", Action = ["secretsmanager:DescribeSecret", "secretsmanager:RotateSecret"], Resource = var.rotated_secrets },
      ] : s if length(s.Resource) > 0]
    )
  })
}

# One tool's role. Its permissions are a managed policy: inline policies share
# the 10,240 characters that the deny list needs.
resource "aws_iam_policy" "crm" {
  name = "crm"
  path = "/mayfly/"
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      { Effect = "Allow", Action = ["s3:GetObject", "s3:ListBucket"], Resource = [local.bucket, "${local.bucket}/*"] },
      { Sid = "Probe", Effect = "Allow", Action = "sts:DecodeAuthorizationMessage", Resource = "*" },
    ]
  })
}

resource "aws_iam_role" "crm" {
  name                 = "crm"
  path                 = "/mayfly/"
  max_session_duration = 3600
  permissions_boundary = aws_iam_policy.boundary.arn
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { AWS = aws_iam_role.broker.arn }
      Action    = ["sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity"]
    }]
  })
  # The deny list is the broker's to write: inline policies are not for Terraform
  # to manage, by inline_policy or aws_iam_role_policies_exclusive. A role that
  # is destroyed takes its list with it.
  force_detach_policies = true
}

resource "aws_iam_role_policy_attachment" "crm" {
  role       = aws_iam_role.crm.name
  policy_arn = aws_iam_policy.crm.arn
}

output "broker_role" { value = aws_iam_role.broker.arn }
output "crm_role" { value = aws_iam_role.crm.arn }
