//! What the engine needs from its environment: tasks and time. The daemon runs on
//! [`crate::reactor`], the simulator on a seeded executor with a virtual clock.

use futures_util::future::BoxFuture;
use std::thread::Builder;
use std::time::Duration;

/// The stack of a thread in bytes. A daemon keeps all its memory resident, so this is less than
/// usual.
const STACK: usize = 512 << 10;

/// A thread of a program that may be a daemon.
pub fn thread(name: &str) -> Builder {
    Builder::new().name(name.into()).stack_size(STACK)
}

/// Runs tasks and keeps time.
pub trait Runtime: Send + Sync + 'static {
    /// Runs a task in the background until it ends.
    fn spawn(&self, task: BoxFuture<'static, ()>);

    /// Completes after a time.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;

    /// Whether this thread runs other tasks as well. Then these wait while it does something long.
    fn is_thread_shared(&self) -> bool {
        true
    }

    /// Time since some fixed moment; never goes back.
    fn now(&self) -> Duration;

    /// Time since the beginning of 1970 (UTC), for people to read. May jump.
    fn wall_clock(&self) -> Duration;
}
