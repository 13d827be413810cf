//! That the cache device has failed. A flush that failed once may succeed the next time, although
//! data is lost. So the next process must not try again.

use super::{Head, at};
use crate::device::{DeviceError, Operation};
use nix::errno::Errno;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const OPERATIONS: [Operation; 5] = [
    Operation::Read,
    Operation::Write,
    Operation::Flush,
    Operation::Discard,
    Operation::DurableWrite,
];
/// Above all error numbers.
const UNIT: u64 = 1024;

impl Head {
    /// Notes a failure for the next process.
    pub(crate) fn note_failure(&self, error: &DeviceError) {
        let code = OPERATIONS.iter().position(|it| *it == error.operation).map_or(0, |it| it + 1);
        let cause = u64::from((error.cause as i32).unsigned_abs());
        self.memory.store(at::FAILURE_OFFSET, error.offset);
        self.memory.store(at::FAILURE_LENGTH, error.length);
        self.memory.store(at::FAILURE, crate::format::to_u64(code) * UNIT + cause);
    }

    /// The failure that an earlier process has noted, of the cache device of this name.
    pub(crate) fn failure(&self, device: &Arc<str>) -> Option<DeviceError> {
        let word = |at| self.memory.word(at).load(Ordering::Acquire);
        let failure = word(at::FAILURE);
        let nth = super::small(failure / UNIT).saturating_sub(1);
        (failure != 0).then(|| DeviceError {
            device: device.clone(),
            operation: OPERATIONS.get(nth).copied().unwrap_or(Operation::Write),
            offset: word(at::FAILURE_OFFSET),
            length: word(at::FAILURE_LENGTH),
            cause: i32::try_from(failure % UNIT).map_or(Errno::EIO, Errno::from_raw),
        })
    }
}
