//go:build unix && !linux

package testbed

func freeSharedMemory(string) {}
