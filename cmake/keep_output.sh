#!/bin/sh
# Runs a compiler and keeps what it says beside the object: `keep_output.sh <object> <command...>`.
# ptxas reports registers and spills there, once, when the object is built; tests read it later.
object=$1
shift
"$@" >"$object.log" 2>&1
status=$?
[ $status -eq 0 ] || cat "$object.log" >&2
exit $status
