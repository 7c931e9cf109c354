# What is done in the guest; every line that begins with "guest:" is for the test to judge.
. /run/settings
export PATH="$BIN:/usr/sbin:/usr/bin:/sbin:/bin" PYTHONPATH="$QUIET:$REPOSITORY" HOME=/run
primary=$LAB/primary
place=/run/place
cd /run || exit

tell() {
    read -r seconds _ </proc/uptime
    echo "guest: $*"
    echo "(at $seconds s)"
}
try() { # COMMAND...: on a slow machine a launch may take longer than it allows itself
    for _ in 1 2 3 4 5; do "$@" && return; done
    tell "failed $*"
}
driver() { cat "$primary/run/dsgrp000.driver.pid" 2>/dev/null; }
until_file() { # NAME
    until [ -s "$place/$1" ] || [ -e /run/written ]; do sleep 0.2; done
}
protection() { # CHILD ROOT: what the kernel itself has granted to a child, and to how many threads
    pid=$(cat "$2/run/dsgrp000.$1.pid")
    threads=0 flushers=0
    for stat in "/proc/$pid/task"/*/stat; do
        read -r line <"$stat"
        # Behind the name in brackets the seventh is the flags, of which PR_SET_IO_FLUSHER sets
        # PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE (proc(5); the kernel's include/linux/sched.h).
        set -- "$1" ${line##*) }
        threads=$((threads + 1))
        [ $(($8 & 0x180000)) -eq $((0x180000)) ] && flushers=$((flushers + 1))
    done
    locked=$(sed -n 's/^VmLck:[^0-9]*//p' "/proc/$pid/status")
    tell "$1: $flushers of $threads threads flush, $locked locked, score $(cat "/proc/$pid/oom_score_adj")"
}

# The fake kernel of the unit tests promises what this one does.
python "$REPOSITORY/tests/tools/nbdkernel.py" RealKernelTests 2>&1 | tail -n 1 >/run/contract &

# What the commands say goes into a file: on a terminal they would draw how far they are, and a
# machine that is emulated has better things to do.
try qdslab start "$LAB" >>/run/told 2>&1
wait
cat /run/told
tell "contract $(cat /run/contract)"
tell "started $(uname -r)"

qdsattach --root "$primary" >/run/told 2>&1 || tell "failed qdsattach: $(cat /run/told)"
device=$primary/dev/qds0
tell "device $(readlink "$device")"
mkfs.ext4 -q "$device" && mkdir $place && mount -t ext4 "$device" $place && tell "mounted"

# Three ways of being in the middle of something when the driver dies.
(
    for number in $FILES; do
        seq "${number}00000" "${number}04999" | dd of=$place/part bs=4k conv=fsync 2>/dev/null &&
            mv $place/part "$place/f$number" || tell "failed to write f$number"
        # A driver that is killed when all is written is missed by nobody.
        earlier=f$((number - 3))
        case " $KILL_AT " in
            *" $earlier "*) until [ -e "/run/$earlier.killed" ]; do sleep 0.2; done ;;
        esac
    done
    sync
    touch /run/written
) &
(
    until [ -e /run/written ]; do
        dd if=/dev/zero of=$place/direct bs=64k count=16 oflag=direct 2>/dev/null ||
            { tell "failed to write directly"; sleep 1; }
    done
) &
(
    until [ -e /run/written ]; do
        dd if="$device" of=/dev/null bs=1M count=4 iflag=direct 2>/dev/null ||
            { tell "failed to read"; sleep 1; }
    done
) &
for name in $KILL_AT; do
    until_file "$name"
    killed=$(driver)
    kill -9 "$killed" && tell "killed $killed"
    touch "/run/$name.killed"
    until [ "$(driver || echo "$killed")" != "$killed" ]; do sleep 0.2; done
done
wait
tell "written"
# The driver's child is by now one that was started while its predecessor was missed.
protection driver "$primary"
protection pmd "$primary"
protection rmd "$LAB/secondary"
tell "refused $(cat "$primary"/var/qds*.log | grep -c 'not all that protects')"

sync
umount $place && tell "unmounted"
qdsdetach --root "$primary" >/run/told 2>&1 || tell "failed qdsdetach: $(cat /run/told)"
[ -e "$device" ] || [ -e "/sys/block/nbd0/pid" ] || tell "detached"
tell "reconnected $(grep -c 'connected again' "$primary/var/qds0.keeper.log")"
cat "$primary/var/qds0.keeper.log"
qdsinfo --root "$primary" --wait drained --timeout 300 >/dev/null 2>&1 && tell "drained"

data=$primary/devices/qds0.data
mirror=$LAB/secondary/devices/qds0.mirror
cmp "$data" "$mirror" && tell "equal"
e2fsck -f -n "$mirror" >/run/fsck 2>&1 && tell "clean" || cat /run/fsck
mount -t ext4 -o ro,loop "$mirror" $place
for number in $FILES; do
    tell "sum f$number $(sha256sum <"$place/f$number" | cut -d' ' -f1)"
done
umount $place
tell "errors $(dmesg | grep -c -i 'i/o error')"
dmesg | grep -i -E 'nbd|error' | tail -n 40
tell "end"
