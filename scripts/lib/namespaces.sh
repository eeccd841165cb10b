# Sourced by two_nodes.sh: two machines on one. Two network namespaces, joined by a virtual cable and by nothing else,
# each with a host name and an sshd of its own; files are shared, as on a cluster.
# shellcheck shell=bash

NODES=(llava0 llava1) ADDRESSES=(10.213.77.1 10.213.77.2) CABLE=cable
SSHD=$(command -v sshd || echo /usr/sbin/sshd)

# need_namespaces: one line for what is missing.
need_namespaces() {
  local missing=""
  command -v ip >/dev/null || missing+=" iproute2"
  [ -x "$SSHD" ] && command -v ssh-keygen >/dev/null || missing+=" openssh-server openssh-client"
  [ -z "$missing" ] || die "needs Debian's$missing: apt-get install -y$missing"
  [ "$(id -u)" -eq 0 ] || die "needs root, to make network namespaces"
  local node
  for node in "${NODES[@]}"; do
    [ ! -e "/run/netns/$node" ] || die "the network namespace $node is there already: another run, or one that was killed (ip netns del $node)"
  done
}

# make_nodes FOLDER: keys, settings and process ids go to FOLDER; `remove_nodes` undoes it all.
make_nodes() {
  local folder=$1 index
  for index in 0 1; do ip netns add "${NODES[$index]}" || die "may not make network namespaces here"; done
  ip -n "${NODES[0]}" link add "$CABLE" type veth peer name "$CABLE" netns "${NODES[1]}"
  ssh-keygen -q -t ed25519 -N "" -f "$folder/key"
  mkdir -p /run/sshd "$folder/bin"
  for index in 0 1; do # `ip netns exec` shows it as /etc/hosts: names are known without a name server
    mkdir -p "/etc/netns/${NODES[$index]}"
    printf '%s\n' "127.0.0.1 localhost" "${ADDRESSES[0]} ${NODES[0]}" "${ADDRESSES[1]} ${NODES[1]}" >"/etc/netns/${NODES[$index]}/hosts"
  done
  for index in 0 1; do
    ip -n "${NODES[$index]}" address add "${ADDRESSES[$index]}/29" dev "$CABLE"
    ip -n "${NODES[$index]}" link set lo up
    ip -n "${NODES[$index]}" link set "$CABLE" up
    cat >"$folder/sshd$index" <<END
ListenAddress ${ADDRESSES[$index]}:22
HostKey $folder/key
AuthorizedKeysFile $folder/key.pub
PidFile $folder/sshd$index.pid
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
END
    ip netns exec "${NODES[$index]}" unshare --uts bash -c "hostname ${NODES[$index]} && exec $SSHD -f $folder/sshd$index"
  done
  cat >"$folder/ssh_config" <<END
Host *
  User root
  IdentityFile $folder/key
  IdentitiesOnly yes
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
END
  printf '#!/bin/sh\nexec %s -F %s "$@"\n' "$(command -v ssh)" "$folder/ssh_config" >"$folder/bin/ssh"
  chmod +x "$folder/bin/ssh"
}

# on_node INDEX COMMAND...: the process is COMMAND itself, so its id is that of the job.
on_node() {
  local index=$1
  shift
  # shellcheck disable=SC2016 # the inner shell's
  exec ip netns exec "${NODES[$index]}" unshare --uts bash -c 'hostname "$0" && exec "$@"' "${NODES[$index]}" \
    env PATH="$folder/bin:$PATH" GLOO_SOCKET_IFNAME="$CABLE" "$@"
}

remove_nodes() {
  local node
  for node in "${NODES[@]}"; do
    ip netns pids "$node" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
    ip netns del "$node" 2>/dev/null || true
    rm -rf "/etc/netns/$node"
  done
}
