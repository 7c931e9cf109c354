#!/bin/busybox sh
# The guest's first program: the host's tree over 9p, read-only, with a lab of its own in memory.
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
$bb mount -t devtmpfs dev /dev
for module in /modules/*; do
    $bb insmod "$module" || echo "init: $module cannot be loaded"
done
. /settings

$bb mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro root /host
$bb mount -t tmpfs tmpfs /lab
$bb cp -a "/host$LAB/." /lab/
$bb mount --move /lab "/host$LAB"
$bb mount -t tmpfs tmpfs /host/run
$bb cp /settings /script.sh /host/run/
for directory in proc sys dev; do
    $bb mount --move /$directory /host/$directory
done
$bb ip link set lo up
$bb chroot /host /bin/sh /run/script.sh </host/dev/console >/host/dev/console 2>&1
echo o >/host/proc/sysrq-trigger
$bb sleep 60
