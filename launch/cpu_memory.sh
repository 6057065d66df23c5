# Memory settings of the C library for JAX on a CPU. Before starting Python:
#   source launch/cpu_memory.sh
#
# On a CPU, every run of a compiled program allocates its buffers and frees them afterwards. By
# default the C library returns large blocks to the kernel, which must find and clear them again; in
# a virtual machine, a training step that uses gigabytes can spend more than a third of its time on
# that. With these settings the process keeps its memory, in pages of 2 MiB. The C library reads
# them when a process starts, so Python cannot set them for itself. Settings that are already given
# are kept and take precedence.
case "${GLIBC_TUNABLES:-}" in
  *glibc.malloc.mmap_max*) ;;
  *)
    _settings=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776
    _settings=$_settings:glibc.malloc.top_pad=268435456:glibc.malloc.arena_max=1
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}$_settings"
    unset _settings ;;
esac
