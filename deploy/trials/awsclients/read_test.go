package awsclients

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// This file is a program that knows AWS's SDK for Go and nothing of Mayfly. The
// test runs it as a process of its own.

// read lists and reads an object for some seconds, and prints how often it did.
// Credentials, region and endpoint come from the environment.
func read(ctx context.Context, args []string) error {
	bucket, key := args[0], args[1]
	seconds, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	c, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return err
	}
	client := s3.NewFromConfig(c, func(o *s3.Options) {
		o.UsePathStyle, o.DisableLogOutputChecksumValidationSkipped = true, true // MinIO keeps no checksums
	})
	out := readings{}
	for end := time.Now().Add(time.Duration(seconds) * time.Second); ; {
		if out.Content, err = readOne(ctx, client, bucket, key); err != nil {
			return err
		}
		if out.Reads++; time.Now().After(end) {
			return json.NewEncoder(os.Stdout).Encode(out)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// readings are what each program prints.
type readings struct {
	Reads   int    `json:"reads"`
	Content string `json:"content"`
}

func readOne(ctx context.Context, client *s3.Client, bucket, key string) (string, error) {
	list, err := client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: &bucket, Prefix: &key})
	if err != nil {
		return "", err
	}
	if len(list.Contents) != 1 || aws.ToString(list.Contents[0].Key) != key {
		return "", fmt.Errorf("the list has %d objects", len(list.Contents))
	}
	object, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: &bucket, Key: &key})
	if err != nil {
		return "", err
	}
	defer object.Body.Close()
	text, err := io.ReadAll(object.Body)
	return string(text), err
}
