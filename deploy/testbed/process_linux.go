package testbed

import "syscall"

// endWithParent has the child sent s when this process ends, however it ends.
func endWithParent(a *syscall.SysProcAttr, s syscall.Signal) { a.Pdeathsig = s }
