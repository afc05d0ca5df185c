#!/bin/sh
# Runs a command beside `mayfly aws serve`, with the two variables that it prints:
# the endpoint, and the file with its token.
#
# served.sh FILE MAYFLY COMMAND [ARG...]
set -eu
vars=$1 mayfly=$2
shift 2
"$mayfly" aws serve crm.export --param customer=acme --ttl 12s >"$vars" &
while ! [ -s "$vars" ]; do sleep 0.05; done
. "$vars"
status=0
"$@" || status=$?
kill $!
wait $!
exit $status
