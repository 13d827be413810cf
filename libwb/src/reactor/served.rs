//! Commands that the kernel completes when users of a served block device have a request.
//!
//! They are not operations: each waits until a user of the device wants something, perhaps for
//! ever. If the answer is known at once, no task is made, which saves time.

use super::operation::Target;
use crate::sys::LazyBuffer;
use io_uring::{opcode, squeue, types};
use nix::errno::Errno;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// A command for the driver. The driver may access the buffer until the command completes.
pub(crate) struct Command {
    /// The tag of the request that it is about.
    pub(crate) tag: u16,
    pub(crate) code: u32,
    pub(crate) argument: [u8; 16],
    pub(crate) buffer: LazyBuffer,
}

/// Answers the requests of a block device.
pub(crate) trait Server: Send + Sync {
    /// A command has completed: there is a request, or an error. Returns the next command if the
    /// answer is known at once. The reactor's thread calls this, so it must not block.
    fn completed(self: Arc<Self>, command: Command, ended: Result<(), Errno>) -> Option<Command>;
}

/// A command, who gets its completion, and where it goes.
pub(super) struct Served {
    pub(super) device: Target,
    pub(super) server: Arc<dyn Server>,
    /// There unless its completion is being handled.
    pub(super) command: Option<Command>,
}

impl Served {
    /// Its submission. The kernel gets the buffer by the address in the argument.
    pub(super) fn entry(&self) -> Option<squeue::Entry> {
        let command = self.command.as_ref()?;
        let fd = types::Fd(self.device.file().as_raw_fd());
        Some(opcode::UringCmd16::new(fd, command.code).cmd(command.argument).build())
    }

    /// Has its completion handled. Returns whether there is a next command.
    pub(super) fn completed(&mut self, result: i32) -> bool {
        let ended = if result < 0 { Err(Errno::from_raw(-result)) } else { Ok(()) };
        let command = self.command.take();
        self.command = command.and_then(|command| self.server.clone().completed(command, ended));
        self.command.is_some()
    }
}
