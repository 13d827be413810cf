//! Reads and writes a volume in the VM, without the page cache. `tests/vm/run.sh` builds it as one
//! static program. In an emulated machine, a process for each request would cost more than all
//! else.
//!
//! usage: volume write DEVICE NAME, which does what NAME.ops says with the data in NAME.data; or
//! volume dump DEVICE FILE

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Result, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

const O_DIRECT: i32 = 0x4000;
const ALIGNMENT: usize = 4096;
const DUMP_BYTES: usize = 256 * 1024;

/// Memory that starts where O_DIRECT needs it to.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new(length: usize) -> Aligned {
        let memory = vec![0; length + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Aligned { memory, start }
    }

    fn bytes(&mut self, length: usize) -> &mut [u8] {
        &mut self.memory[self.start..][..length]
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["write", device, name] => work(device, name),
        ["dump", device, file] => dump(device, file),
        _ => panic!("usage: volume write DEVICE NAME | volume dump DEVICE FILE"),
    }
}

fn open(device: &str) -> Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(device)
}

fn work(device: &str, name: &str) -> Result<()> {
    let device = open(device)?;
    let data = fs::read(format!("{name}.data"))?;
    for line in fs::read_to_string(format!("{name}.ops"))?.lines() {
        let mut words = line.split_whitespace();
        let op = words.next();
        let numbers: Vec<usize> = words.map(|word| word.parse().expect("a number")).collect();
        match (op, &numbers[..]) {
            (Some("write"), &[at, length, skip]) => {
                let mut memory = Aligned::new(length);
                memory.bytes(length).copy_from_slice(&data[skip..][..length]);
                device.write_all_at(memory.bytes(length), at as u64)?;
            }
            (Some("read"), &[at, length, ..]) => {
                device.read_exact_at(Aligned::new(length).bytes(length), at as u64)?;
            }
            (Some("flush"), _) => device.sync_data()?,
            _ => panic!("{line}: no operation"),
        }
    }
    Ok(())
}

fn dump(device: &str, file: &str) -> Result<()> {
    let (mut device, mut file) = (open(device)?, File::create(file)?);
    let mut memory = Aligned::new(DUMP_BYTES);
    loop {
        let length = device.read(memory.bytes(DUMP_BYTES))?;
        if length == 0 {
            return Ok(());
        }
        file.write_all(memory.bytes(length))?;
    }
}
