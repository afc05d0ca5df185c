"""Lists and reads an object for some seconds with boto3, as any program would
that knows nothing of Mayfly: the profile says where credentials come from.

read.py ENDPOINT BUCKET KEY SECONDS
"""
import json
import sys
import time

import boto3

endpoint, bucket, key, seconds = sys.argv[1:]
s3 = boto3.Session().client("s3", endpoint_url=endpoint)
end = time.monotonic() + float(seconds)
reads = 0
while True:
    found = s3.list_objects_v2(Bucket=bucket, Prefix=key)["Contents"]
    assert [o["Key"] for o in found] == [key], found
    content = s3.get_object(Bucket=bucket, Key=key)["Body"].read().decode()
    reads += 1
    if time.monotonic() > end:
        break
    time.sleep(0.05)
print(json.dumps({"reads": reads, "content": content}))
