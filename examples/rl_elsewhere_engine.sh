#!/usr/bin/env bash
# Keep an engine at the newest version that FOLDER has. A server of isthmus takes the changes themselves. vLLM, on any
# chip, takes whole weights from a folder that it can read: add --bundle SERVED --exchange FOLDER.
#
#   rl_elsewhere_engine.sh FOLDER http://engine:8000 ADMIN_KEY_FILE [further options of `isthmus follow`, such as --once]
set -euo pipefail
isthmus follow "$1" --engine "$2" --api-key-file "$3" "${@:4}"
