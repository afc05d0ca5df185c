#!/bin/sh
# Lists and reads an object for some seconds with the AWS CLI, a process each
# time. The profile says where credentials come from.
#
# read.sh ENDPOINT BUCKET KEY SECONDS
set -eu
end=$(($(date +%s) + $4))
reads=0
while [ "$(date +%s)" -lt "$end" ]; do
  aws --endpoint-url "$1" s3 ls "s3://$2/$3" | grep -q "${3##*/}"
  content=$(aws --endpoint-url "$1" s3 cp "s3://$2/$3" -)
  reads=$((reads + 1))
done
printf '{"reads": %d, "content": "%s"}\n' "$reads" "$content"
