//! Whether the cache takes requests, and how it ends.

use crate::cache::error::CacheError;
use crate::device::DeviceError;

#[derive(Default)]
pub(crate) struct Lifecycle {
    /// The cache device failed: nothing is acknowledged any more.
    failure: Option<DeviceError>,
    stage: Stage,
    /// Background tasks that have not ended.
    tasks: usize,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    #[default]
    Open,
    /// No more requests are taken.
    Closing,
    /// Background tasks are to end.
    Stopping,
}

/// What of it others wait for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct LifecycleMark {
    failed: bool,
    stage: Stage,
    tasks: usize,
}

impl Lifecycle {
    #[inline]
    pub(crate) fn mark(&self) -> LifecycleMark {
        LifecycleMark { failed: self.failure.is_some(), stage: self.stage, tasks: self.tasks }
    }

    /// The cache device failed. Only the first failure counts. Returns whether it is this one.
    pub(crate) fn fail(&mut self, error: DeviceError) -> bool {
        let is_first = self.failure.is_none();
        self.failure.get_or_insert(error);
        is_first
    }

    /// Why nothing is acknowledged any more, if so.
    pub(crate) fn failure(&self) -> Option<&DeviceError> {
        self.failure.as_ref()
    }

    /// Takes no more requests.
    pub(crate) fn close(&mut self) {
        self.stage = self.stage.max(Stage::Closing);
    }

    /// Lets the background tasks end.
    pub(crate) fn stop(&mut self) {
        self.stage = Stage::Stopping;
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.stage >= Stage::Closing
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stage == Stage::Stopping
    }

    /// Whether requests can only fail from now on.
    #[inline]
    pub(crate) fn is_ending(&self) -> bool {
        self.failure.is_some() || self.is_closing()
    }

    /// Whether background tasks are to end.
    pub(crate) fn is_over(&self) -> bool {
        self.failure.is_some() || self.is_stopping()
    }

    /// For what a request asks of the cache.
    ///
    /// # Errors
    /// When the cache device failed, or no more requests are taken.
    #[inline]
    pub(crate) fn check_open(&self) -> Result<(), CacheError> {
        self.check(Stage::Closing)
    }

    /// For what is done until the tasks end, such as a flush at the end.
    ///
    /// # Errors
    /// When the cache device failed, or the background tasks are to end.
    pub(crate) fn check_running(&self) -> Result<(), CacheError> {
        self.check(Stage::Stopping)
    }

    fn check(&self, too_late: Stage) -> Result<(), CacheError> {
        match &self.failure {
            Some(failure) => Err(CacheError::Failed(failure.clone())),
            None if self.stage >= too_late => Err(CacheError::Closed),
            None => Ok(()),
        }
    }

    /// Background tasks were started.
    pub(crate) fn tasks_started(&mut self, tasks: usize) {
        self.tasks = tasks;
    }

    /// A background task has ended.
    pub(crate) fn task_ended(&mut self) {
        self.tasks -= 1;
    }

    /// Whether all background tasks have ended.
    pub(crate) fn have_tasks_ended(&self) -> bool {
        self.tasks == 0
    }
}
