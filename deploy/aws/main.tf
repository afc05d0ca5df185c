# Sets up one AWS account for Mayfly's driver awssts: the broker's own role, the
# boundary of what it can bring about, and one tool's role as an example.
# See docs/aws.md.
terraform {
  required_providers {
    aws = { source = "hashicorp/aws", version = ">= 5.0" }
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

variable "bucket" {
  description = "The bucket of the example's tool"
  type        = string
}

data "aws_caller_identity" "this" {}
data "aws_partition" "this" {}

locals {
  tool_roles = "arn:${data.aws_partition.this.partition}:iam::${data.aws_caller_identity.this.account_id}:role/mayfly/*"
  bucket     = "arn:${data.aws_partition.this.partition}:s3:::${var.bucket}"
}

resource "aws_iam_openid_connect_provider" "spire" {
  url            = "https://${var.issuer}"
  client_id_list = [var.audience]
}

# What the sessions of tools can do at most, whatever anybody writes into their
# roles: the broker may write policies of roles with this boundary only. Add
# what tools are for; leave out IAM and STS.
resource "aws_iam_policy" "boundary" {
  name = "mayfly-boundary"
  path = "/mayfly/"
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      { Effect = "Allow", Action = ["s3:*", "sts:DecodeAuthorizationMessage"], Resource = "*" },
      { Effect = "Deny", Action = ["iam:*", "sts:AssumeRole*", "sts:GetFederationToken", "organizations:*", "account:*"], Resource = "*" },
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
    Statement = [
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
    ]
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
  # The deny list is the broker's to write.
  lifecycle { ignore_changes = [inline_policy] }
}

resource "aws_iam_role_policy_attachment" "crm" {
  role       = aws_iam_role.crm.name
  policy_arn = aws_iam_policy.crm.arn
}

output "broker_role" { value = aws_iam_role.broker.arn }
output "crm_role" { value = aws_iam_role.crm.arn }
