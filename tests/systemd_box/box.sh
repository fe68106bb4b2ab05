#!/bin/bash
# A real systemd as PID 1 of its own namespaces, on a throw-away overlay of this machine's root: up in a third of a second.
#   box.sh up DIR        with the files of DIR/base, then DIR/more, laid over; DIR/out is /out inside; needs root, systemd, dbus
#   box.sh in DIR CMD... run a command inside
#   box.sh down DIR
set -u
case ${1:-} in up|in|down) ;; *) sed -n 2,5p "$0"; exit 64 ;; esac
W=$(realpath -m "$2")
name=box-$(basename "$W")-$(printf %s "$W" | cksum | cut -d' ' -f1)
G=/sys/fs/cgroup/unified; [ -d $G ] || G=/sys/fs/cgroup
G=$G/$name
case $1 in
up)
  mkdir -p "$W/t" "$W/out" "$G"
  cat >"$W/init" <<'X'
set -e; W=$1
mount -t tmpfs t "$W/t"; cd "$W/t"; mkdir u w m; mount -t overlay o -o lowerdir=/,upperdir=u,workdir=w m; cd m
mount -t proc proc proc; mount --bind proc/sys proc/sys; mount -o remount,ro,bind proc/sys
mount -t sysfs -o ro sysfs sys; mount -t cgroup2 cg sys/fs/cgroup
mount -t tmpfs -o mode=755 t run; mount -t tmpfs -o mode=1777 t tmp; mkdir -p out; mount --bind "$W/out" out
mount -t tmpfs -o mode=755 t dev; mkdir dev/pts dev/shm; mount -t tmpfs -o mode=1777 t dev/shm
for d in null zero full random urandom tty; do touch dev/$d; mount --bind /dev/$d dev/$d; done
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 p dev/pts; ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd; for i in 0:stdin 1:stdout 2:stderr; do ln -s fd/${i%:*} dev/${i#*:}; done
mount -t tmpfs t etc/systemd/system
for d in base more; do [ ! -d "$W/$d" ] || cp -a "$W/$d"/* .; done
: >etc/machine-id; rm -rf var/log/journal; hostname box
mkdir -p .old; mount --make-rprivate /; pivot_root . .old; cd /; umount -l .old; mount --make-rshared /
exec env -i container=box PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --unit=multi-user.target
X
  setsid bash -c 'echo $$ >"$1/cgroup.procs"; exec unshare -m -p -f -C -u -i -n --kill-child --propagation private bash "$2/init" "$2"' \
    _ "$G" "$W" </dev/null >"$W/log" 2>&1 &
  P=$!
  for _ in $(seq 300); do
    LP=$(cat /proc/$P/task/$P/children 2>/dev/null | tr -d ' ')
    [ -n "$LP" ] && [ "$(cat /proc/$LP/comm 2>/dev/null)" = systemd ] && break
    kill -0 $P 2>/dev/null || { cat "$W/log" >&2; exit 1; }
    sleep .01
  done
  echo "$P $LP" >"$W/pids"
  for _ in $(seq 300); do
    s=$("$0" in "$W" timeout 30 systemctl is-system-running --wait 2>/dev/null)
    case $s in running|degraded) echo "up: $s"; exit 0 ;; esac
    sleep .02
  done
  echo "no systemd after 6 s" >&2; cat "$W/log" >&2; exit 1 ;;
in)
  read -r P LP <"$W/pids"; shift 2
  exec nsenter -t "$LP" -m -p -C -u -i -n -- env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@" ;;
down)
  read -r P LP <"$W/pids"
  [ "$LP" -gt 1 ] && kill -9 "$LP"
  while kill -0 "$P" 2>/dev/null; do sleep .02; done
  for _ in 1 2 3 4 5; do find "$G" -depth -type d -exec rmdir {} \; 2>/dev/null; [ -d "$G" ] || break; sleep .1; done
  rm -rf "$W" ;;
esac
