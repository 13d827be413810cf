//! Which boot of the system this is.

use std::fs::read_to_string;

/// Where the kernel says it, as a UUID.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The boot id; zeros where the system does not tell it.
pub(crate) fn boot_id() -> [u8; 16] {
    let text = read_to_string(BOOT_ID).unwrap_or_default();
    text.trim().parse().map(uuid::Uuid::into_bytes).unwrap_or_default()
}
