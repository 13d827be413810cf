//! The process dies, and the machine does not: the log's head stays, and requests that were not
//! answered come again.

use super::{Scenario, Stage};
use crate::sim::engine::EngineVolume;
use crate::sim::unanswered::Served;
use fastrand::Rng;
use futures_channel::oneshot;
use libwb::cache::Head;
use libwb::runtime::Runtime;
use parking_lot::Mutex;
use std::sync::Arc;

/// The head of the log, and when the process dies for good between two steps of a change to it.
pub(super) struct Heads {
    /// That of the process that lives, or lived last.
    head: Option<Head>,
    /// What was in it when the process died between two steps.
    left: Arc<Mutex<Option<Head>>>,
    lives_on: bool,
    rng: Rng,
}

impl Heads {
    pub(super) fn new(seed: u64) -> Heads {
        Heads {
            head: None,
            left: Arc::default(),
            lives_on: false,
            rng: Rng::with_seed(seed.rotate_left(16)),
        }
    }

    /// Lets go of it: the volume is closed, or the power has failed.
    pub(super) fn forget(&mut self) {
        if let Some(head) = self.head.take() {
            head.watch(|_| ());
        }
        *self.left.lock() = None;
    }

    /// The process that begins does not die between two steps.
    pub(super) fn live_on(&mut self) {
        self.lives_on = true;
    }

    /// Whether the process died between two steps.
    pub(super) fn died_within(&self) -> bool {
        self.left.lock().is_some()
    }

    /// After a death: whether the next process gets the head.
    pub(super) fn is_left(&mut self) -> bool {
        if let Some(left) = self.left.lock().take() {
            self.head = Some(left);
            return true;
        }
        self.head.is_some() && self.rng.u32(..4) > 0
    }
}

impl Scenario<'_> {
    /// The head for the process that begins.
    pub(super) fn head(&mut self) -> Result<Option<Head>, String> {
        if !self.engine.has_head() {
            return Ok(None);
        }
        let head = match &self.heads.head {
            Some(head) => head.descriptor().try_clone_to_owned().and_then(Head::open),
            None => Head::create(),
        };
        let head = head.map_err(|e| format!("no memory for the head: {e}"))?;
        self.heads.head = Some(head.clone());
        if !self.heads.lives_on && self.heads.rng.u32(..3) == 0 {
            let most = 1 << self.heads.rng.u32(..14);
            let steps = Mutex::new(self.heads.rng.u32(..most));
            let (left, runtime) = (self.heads.left.clone(), self.runtime().clone());
            head.watch(move |head| {
                let mut steps = steps.lock();
                match steps.checked_sub(1) {
                    Some(rest) => *steps = rest,
                    None if runtime.is_halted() => {}
                    None => {
                        *left.lock() = head.copy().ok();
                        runtime.halt();
                    }
                }
            });
        }
        Ok(Some(head))
    }

    pub(super) fn served(&self, volume: &Arc<dyn EngineVolume>) -> Served {
        Served {
            volume: volume.clone(),
            oracle: self.oracle.clone(),
            runtime: self.runtime().clone(),
            unanswered: self.unanswered.clone(),
        }
    }

    /// The kernel hands out again what was not answered.
    pub(super) fn hand_out_again(&mut self, volume: &Arc<dyn EngineVolume>) {
        let served = self.served(volume);
        let asked: Vec<_> =
            self.unanswered.lock().iter().map(|(&id, &asked)| (id, asked)).collect();
        for (write, asked) in asked {
            self.oracle.lock().comes_again(write, asked.first, asked.count);
            let (served, (done, end)) = (served.clone(), oneshot::channel());
            let faulty = self.faulty;
            self.runtime().spawn(Box::pin(async move {
                if let Err(e) = served.carry_out(write, asked).await
                    && !faulty
                {
                    served.oracle.lock().fail(&format!("{asked:?} failed when it came again: {e}"));
                }
                let _ = done.send(());
            }));
            self.coming_again.push(end);
        }
    }

    /// Waits for what was handed out again.
    pub(super) fn await_what_came_again(&mut self) -> Result<Stage<()>, String> {
        let ends = std::mem::take(&mut self.coming_again);
        let all = futures_util::future::join_all(ends);
        Ok(match self.finish("what came again", all)? {
            Stage::Done(_) => Stage::Done(()),
            Stage::Halted => Stage::Halted,
        })
    }
}
