package bolt_test

import (
	"path/filepath"
	"testing"

	"github.com/mayfly-security/mayfly/store"
	"github.com/mayfly-security/mayfly/store/bolt"
	"github.com/mayfly-security/mayfly/store/storetest"
)

func TestStore(t *testing.T) {
	storetest.Run(t, func(t testing.TB, dir string) store.Store {
		db, err := bolt.Open(filepath.Join(dir, "store.db"), bolt.Config{})
		if err != nil {
			t.Fatal(err)
		}
		return db
	})
}
