//! The error numbers of the protocol.

use nix::errno::Errno;

/// The error that stands for `errno` on the wire.
pub fn error_of(errno: Errno) -> u32 {
    match errno {
        Errno::EPERM | Errno::EROFS => 1,
        Errno::ENOMEM => 12,
        Errno::EINVAL => 22,
        Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG => 28,
        Errno::EOVERFLOW => 75,
        Errno::EOPNOTSUPP => 95,
        Errno::ESHUTDOWN => 108,
        _ => 5,
    }
}

/// What an error on the wire means. One that the protocol does not define means `EINVAL`.
pub fn errno_of(error: u32) -> Errno {
    match error {
        1 => Errno::EPERM,
        5 => Errno::EIO,
        12 => Errno::ENOMEM,
        28 => Errno::ENOSPC,
        75 => Errno::EOVERFLOW,
        95 => Errno::EOPNOTSUPP,
        108 => Errno::ESHUTDOWN,
        _ => Errno::EINVAL,
    }
}
