// Lists and reads objects again and again with AWS's SDK for JavaScript, as any
// program would that knows nothing of Mayfly: credentials, region and endpoint
// come from the environment. It prints how often it read what.
//
// read.mjs BUCKET KEY SECONDS
import { GetObjectCommand, ListObjectsV2Command, S3Client } from '@aws-sdk/client-s3'

const [bucket, key, seconds] = process.argv.slice(2)
const s3 = new S3Client({ forcePathStyle: true })
const end = Date.now() + Number(seconds) * 1000
let reads = 0
let content
do {
  const list = await s3.send(new ListObjectsV2Command({ Bucket: bucket, Prefix: key }))
  if (list.KeyCount !== 1 || list.Contents[0].Key !== key) throw new Error(`the list is ${JSON.stringify(list.Contents)}`)
  const object = await s3.send(new GetObjectCommand({ Bucket: bucket, Key: key }))
  content = await object.Body.transformToString()
  reads++
  await new Promise((wake) => setTimeout(wake, 50))
} while (Date.now() < end)
console.log(JSON.stringify({ reads, content }))
