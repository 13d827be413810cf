//! The rights that a process needs to serve a volume, and how it works without the optional ones.

use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

/// A capability, by its number in linux/capability.h.
#[derive(Clone, Copy)]
enum Capability {
    IpcLock = 14,
    SysAdmin = 21,
}

/// Refuses a process that may not make block devices and mounts.
///
/// # Errors
/// Says what is missing.
pub fn refuse_without_root() -> Result<(), String> {
    if has(Capability::SysAdmin) {
        return Ok(());
    }
    Err("serving a volume as a block device needs root (CAP_SYS_ADMIN). Serving it over NBD, on \
         your own files, does not: --serve nbd+unix:///?socket=PATH. Nor does wbctl replay"
        .into())
}

/// Keeps all memory of this process resident, from now on.
///
/// If locked memory is limited, locks nothing: a thread or a buffer beyond the limit could not be
/// allocated any more, and the process would end.
pub(super) fn lock_memory() -> Result<(), String> {
    let limit = raised_limit();
    if limit != RLIM_INFINITY && !has(Capability::IpcLock) {
        return Err(format!(
            "memory cannot be locked: the limit is {} KiB, and only CAP_IPC_LOCK exceeds it. Set \
             ulimit -l unlimited, or LimitMEMLOCK=infinity in a unit",
            limit / 1024
        ));
    }
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)
        .map_err(|cause| format!("memory cannot be locked: {}", cause.desc()))
}

/// The limit for locked memory in bytes, as high as this process may set it.
fn raised_limit() -> u64 {
    let limit = Resource::RLIMIT_MEMLOCK;
    let Ok((soft, hard)) = getrlimit(limit) else { return 0 };
    // With CAP_SYS_RESOURCE, a process may exceed the hard limit; any process may go up to it.
    for wanted in [RLIM_INFINITY, hard] {
        if setrlimit(limit, wanted, wanted.max(hard)).is_ok() {
            return wanted;
        }
    }
    soft
}

/// Whether this process has a capability. If that cannot be told, it may try.
fn has(capability: Capability) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    effective(&status).is_none_or(|set| set >> (capability as u32) & 1 == 1)
}

/// The effective capabilities that /proc/PID/status tells of, a bit for each.
fn effective(status: &str) -> Option<u64> {
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(set.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::effective;

    #[test]
    fn capabilities_are_read_or_not_known() {
        assert_eq!(
            effective("CapPrm:\t00000000ffffffff\nCapEff:\t0000000000204000\n"),
            Some(0x20_4000)
        );
        assert_eq!(effective("CapEff:\tmany\n"), None);
        assert_eq!(effective(""), None);
    }
}
