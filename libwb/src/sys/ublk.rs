//! The interface of the kernel's ublk driver (linux/ublk_cmd.h): its control device, and the table
//! in which it describes requests.
#![allow(unsafe_code)] // a mapping that the kernel writes to, and commands with addresses

use crate::format::to_u64;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::errno::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

/// Where the driver takes commands about devices.
pub(crate) const CONTROL: &str = "/dev/ublk-control";

/// How often a wait checks whether to go on.
const OFTEN: Duration = Duration::from_millis(100);
/// How long the driver may take to begin with a deletion.
const TO_DELETE: Duration = Duration::from_millis(500);
/// What a wait may end with before the command is done.
const AGAIN: [i32; 4] =
    [Errno::EINTR as i32, Errno::ETIME as i32, Errno::EAGAIN as i32, Errno::EBUSY as i32];

/// A command about a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    GetInfo,
    Add,
    Delete,
    Start,
    Stop,
    SetParameters,
    StartRecovery,
    EndRecovery,
    GetFeatures,
    DeleteLater,
}

impl Command {
    /// The number, encoded as an ioctl on `struct ublksrv_ctrl_cmd`.
    fn code(self) -> u32 {
        const READ: u32 = 2 << 30;
        const READ_WRITE: u32 = 3 << 30;
        const STRUCT: u32 = 32 << 16 | 0x75 << 8; // its size, and 'u'
        STRUCT
            | match self {
                Command::GetInfo => READ | 0x02,
                Command::Add => READ_WRITE | 0x04,
                Command::Delete => READ_WRITE | 0x05,
                Command::Start => READ_WRITE | 0x06,
                Command::Stop => READ_WRITE | 0x07,
                Command::SetParameters => READ_WRITE | 0x08,
                Command::StartRecovery => READ_WRITE | 0x10,
                Command::EndRecovery => READ_WRITE | 0x11,
                Command::GetFeatures => READ | 0x13,
                Command::DeleteLater => READ | 0x14,
            }
    }
}

/// `struct ublksrv_ctrl_cmd`.
#[repr(C)]
struct ControlCommand {
    device: u32,
    queue: u16,
    length: u16,
    address: u64,
    data: u64,
    path_length: u16,
    padding: u16,
    reserved: u32,
}

const _: () = assert!(size_of::<ControlCommand>() == 32);

impl ControlCommand {
    fn to(device: u32) -> ControlCommand {
        ControlCommand {
            device,
            queue: u16::MAX,
            length: 0,
            address: 0,
            data: 0,
            path_length: 0,
            padding: 0,
            reserved: 0,
        }
    }
}

/// The control device.
pub(crate) struct Control {
    file: File,
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
}

impl Control {
    /// Opens it.
    ///
    /// # Errors
    /// When there is none, or this process may not use it.
    pub(crate) fn open() -> io::Result<Control> {
        let file = OpenOptions::new().read(true).write(true).open(CONTROL)?;
        Ok(Control { file, ring: IoUring::builder().build(2)? })
    }

    /// Carries out a command. `buffer` is what the kernel reads or fills.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn command(
        &mut self,
        command: Command,
        device: u32,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let address = if buffer.is_empty() { 0 } else { to_u64(buffer.as_mut_ptr().addr()) };
        let length = u16::try_from(buffer.len()).map_err(|_| Errno::EINVAL)?;
        self.push(command, ControlCommand { length, address, ..ControlCommand::to(device) })?;
        // The buffer must outlive the command.
        self.wait(|| true)
    }

    /// Lets this process serve a device from now on: with `Start` a new one, with `EndRecovery` one
    /// of an earlier process. The kernel waits until the process fetches requests. This function
    /// stops waiting once `is_served` returns false.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn start(
        &mut self,
        command: Command,
        device: u32,
        is_served: impl Fn() -> bool,
    ) -> io::Result<()> {
        let data = std::process::id().into();
        self.push(command, ControlCommand { data, ..ControlCommand::to(device) })?;
        self.wait(is_served)
    }

    /// Deletes a device in the way of all kernels: the command ends only when nothing holds the
    /// device any more. The driver deletes it then even if it is not waited for.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn delete(&mut self, device: u32) -> io::Result<()> {
        self.push(Command::Delete, ControlCommand::to(device))?;
        let begun = Instant::now();
        match self.wait(|| begun.elapsed() < TO_DELETE) {
            Err(e) if e.raw_os_error() == Some(Errno::ECANCELED as i32) => Ok(()),
            done => done,
        }
    }

    fn push(&mut self, command: Command, argument: ControlCommand) -> io::Result<()> {
        let mut bytes = [0; 80];
        // SAFETY: the struct is plain data of that size without padding between its fields.
        bytes[..32].copy_from_slice(unsafe {
            &*(&raw const argument).cast::<[u8; size_of::<ControlCommand>()]>()
        });
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), command.code())
            .cmd(bytes)
            .build();
        // SAFETY: the callers wait for the completion, unless the command has no buffer.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| Errno::EBUSY.into())
    }

    /// Waits for the command as long as `go_on` says so.
    fn wait(&mut self, go_on: impl Fn() -> bool) -> io::Result<()> {
        let often = types::Timespec::from(OFTEN);
        while go_on() {
            let waiting = types::SubmitArgs::new().timespec(&often);
            match self.ring.submitter().submit_with_args(1, &waiting) {
                Ok(_) => {}
                Err(e) if e.raw_os_error().is_some_and(|cause| AGAIN.contains(&cause)) => {}
                // The kernel may have the command. Its buffer would be freed under it.
                Err(e) => panic!("io_uring_enter failed: {e}"),
            }
            if let Some(done) = self.ring.completion().next() {
                return match done.result() {
                    0.. => Ok(()),
                    error => Err(io::Error::from_raw_os_error(-error)),
                };
            }
        }
        Err(Errno::ECANCELED.into())
    }
}

/// `struct ublksrv_io_desc`: what the kernel asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Description {
    /// The operation in the lowest byte, and flags.
    pub(crate) operation: u32,
    pub(crate) sectors: u32,
    pub(crate) sector: u64,
    pub(crate) address: u64,
}

const _: () = assert!(size_of::<Description>() == 24);

/// The table of descriptions, one for each tag.
pub(crate) struct Descriptions {
    start: NonNull<Description>,
    depth: u16,
}

// SAFETY: the mapping belongs to this value, and is only read, with volatile reads.
unsafe impl Send for Descriptions {}
// SAFETY: as above.
unsafe impl Sync for Descriptions {}

impl Descriptions {
    /// Maps the table of a device's first queue.
    ///
    /// # Errors
    /// When the system refuses.
    pub(crate) fn map(device: &File, depth: u16) -> io::Result<Descriptions> {
        let (bytes, flags) = (Self::bytes(depth), MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start =
            unsafe { mmap(std::ptr::null_mut(), bytes, ProtFlags::READ, flags, device, 0) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Descriptions { start, depth })
    }

    fn bytes(depth: u16) -> usize {
        (usize::from(depth) * size_of::<Description>()).next_multiple_of(rustix::param::page_size())
    }

    /// What the kernel asks for under a tag. Read it once: nothing but the driver's word says that
    /// it stays the same.
    pub(crate) fn get(&self, tag: u16) -> Description {
        assert!(tag < self.depth, "a tag beyond the queue");
        // SAFETY: the tag lies within the mapping, and any bytes are a description.
        unsafe { self.start.add(usize::from(tag)).read_volatile() }
    }
}

impl Drop for Descriptions {
    fn drop(&mut self) {
        // SAFETY: no reference to the mapping is left.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), Self::bytes(self.depth)) };
    }
}

/// Submits a command with each of the arguments to a device, all in one call, and forgets them: the
/// kernel cancels them.
///
/// # Errors
/// When the system refuses.
pub(crate) fn submit_all(device: &File, code: u32, arguments: &[[u8; 16]]) -> io::Result<()> {
    let entries = u32::try_from(arguments.len()).map_err(|_| Errno::EINVAL)?;
    let mut ring = IoUring::new(entries)?;
    for argument in arguments {
        let fd = types::Fd(device.as_raw_fd());
        let entry = opcode::UringCmd16::new(fd, code).cmd(*argument).build();
        // SAFETY: the driver uses no buffer before the device has started.
        unsafe { ring.submission().push(&entry) }.map_err(|_| Errno::EBUSY)?;
    }
    ring.submit()?;
    match ring.completion().next() {
        Some(refused) => Err(io::Error::from_raw_os_error(-refused.result())),
        None => Ok(()),
    }
}

/// Opens the device through which a server gets the requests of block device `number`.
///
/// # Errors
/// When the system refuses.
pub(crate) fn open_queue(number: u32) -> io::Result<File> {
    let path = format!("/dev/ublkc{number}");
    OpenOptions::new().read(true).write(true).open(Path::new(&path))
}
