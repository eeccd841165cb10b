#!/usr/bin/env bash
# The tests of the page in a headless Chromium. Where there is none, root gets Debian's; elsewhere they say why they are
# skipped.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

FETCH_S=120 # longer than that is a registry out of reach
has_chromium() { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null
install_chromium() {
  local install=(apt-get install -y -qq --no-install-recommends chromium)
  export DEBIAN_FRONTEND=noninteractive
  timeout "$FETCH_S" apt-get update -qq && timeout "$FETCH_S" "${install[@]}" --download-only && "${install[@]}"
}

if ! has_chromium && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  say "Installing Chromium by apt-get"
  install_chromium >/dev/null || say "apt-get gave no Chromium"
fi
exec bash scripts/test.sh -m browser tests/talk/test_page_in_browser.py "$@"
