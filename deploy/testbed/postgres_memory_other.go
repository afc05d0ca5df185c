//go:build unix && !linux

package testbed

func sharedMemory(string) (int, bool) { return 0, false }

func freeSharedMemory(string) {}
