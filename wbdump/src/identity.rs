//! `wbdump identity`: shows which cache is on a device, for udev. It reads three blocks, and never
//! blocks.

use anyhow::{Context, Result, bail};
use libwb::cli::Output;
use libwb::format::{
    BLOCK_BYTES, EXTENSION_OFFSETS, PageFault, SUPERBLOCK_OFFSET, SuperblockExtension, decode_magic,
};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

/// The type of a cache device, for udev and blkid.
const TYPE: &str = "wb_cache";

pub(crate) fn show(path: &Path, out: &mut Output) -> Result<()> {
    let cannot = || format!("{}: cannot read", path.display());
    // Opening a pipe or a tape may block or change it.
    let kind = std::fs::metadata(path).with_context(cannot)?.file_type();
    if !kind.is_block_device() && !kind.is_file() {
        bail!("{}: neither a block device nor a regular file", path.display());
    }
    let device = File::open(path).with_context(cannot)?;
    let block = |offset| -> Result<[u8; BLOCK_BYTES]> {
        let mut block = [0; BLOCK_BYTES];
        device.read_exact_at(&mut block, offset).with_context(cannot)?;
        Ok(block)
    };
    decode_magic(&block(SUPERBLOCK_OFFSET)?).with_context(|| path.display().to_string())?;
    let copies = EXTENSION_OFFSETS.map(|offset| match block(offset) {
        Ok(block) => SuperblockExtension::decode(&block),
        Err(_) => Err(PageFault::Unreadable),
    });
    writeln!(out, "ID_FS_TYPE={TYPE}\nID_FS_USAGE=other")?;
    if let Some(page) = SuperblockExtension::newest(&copies) {
        writeln!(out, "ID_FS_UUID={0}\nID_FS_UUID_ENC={0}", page.uuid)?;
        if !page.label.is_empty() {
            let label = encoded(&page.label);
            writeln!(out, "ID_FS_LABEL={}\nID_FS_LABEL_ENC={label}", label.replace("\\x", "_"))?;
        }
    }
    Ok(())
}

/// Encodes a text as udev does: bytes that could do harm in a path or a shell become hexadecimal
/// codes.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"#+-.:=@_".contains(&byte);
    text.bytes()
        .map(
            |byte| {
                if plain(byte) { char::from(byte).to_string() } else { format!("\\x{byte:02x}") }
            },
        )
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_does_no_harm() {
        assert_eq!(encoded("data-1"), "data-1");
        assert_eq!(encoded("a b/../\n"), "a\\x20b\\x2f..\\x2f\\x0a");
        assert_eq!(encoded("ä"), "\\xc3\\xa4");
        assert_eq!(encoded("\u{1b}[31m\u{202e}"), "\\x1b\\x5b31m\\xe2\\x80\\xae");
    }
}
