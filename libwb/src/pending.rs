//! Counting the requests that a device has not answered yet.

use std::time::Duration;

/// The requests of a device at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// The number of requests that the device has not answered.
    pub requests: u64,
    /// How long the oldest of them has waited.
    pub oldest: Option<Duration>,
    /// The number of requests that it has done without an error since it was opened.
    pub done: u64,
}

#[cfg(feature = "uring")]
pub(crate) use counted::{InFlight, Requests};

#[cfg(feature = "uring")]
mod counted {
    use super::Pending;
    use parking_lot::Mutex;
    use slab::Slab;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Instant;

    /// The requests of a device.
    #[derive(Default)]
    pub(crate) struct Requests {
        /// When each unanswered request began.
        began: Mutex<Slab<Instant>>,
        done: AtomicU64,
    }

    impl Requests {
        /// Counts a request until the returned value is dropped.
        pub(crate) fn begin(self: &Arc<Self>) -> InFlight {
            InFlight { of: self.clone(), key: self.began.lock().insert(Instant::now()) }
        }

        pub(crate) fn pending(&self) -> Pending {
            let began = self.began.lock();
            Pending {
                requests: crate::format::to_u64(began.len()),
                oldest: began.iter().map(|(_, began)| began.elapsed()).max(),
                done: self.done.load(Ordering::Relaxed),
            }
        }
    }

    /// A request under way.
    pub(crate) struct InFlight {
        of: Arc<Requests>,
        key: usize,
    }

    impl InFlight {
        /// Counts the request as done without an error.
        pub(crate) fn succeeded(&self) {
            self.of.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Drop for InFlight {
        fn drop(&mut self) {
            self.of.began.lock().remove(self.key);
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use std::time::Duration;

        #[test]
        fn a_request_counts_until_it_is_answered_and_the_oldest_tells_the_age() {
            let requests = Arc::<Requests>::default();
            assert_eq!(requests.pending(), Pending::default());
            let first = requests.begin();
            std::thread::sleep(Duration::from_millis(20));
            let second = requests.begin();
            let both = requests.pending();
            assert_eq!((both.requests, both.done), (2, 0));
            assert!(both.oldest >= Some(Duration::from_millis(20)), "{both:?}");
            // The answers come in another order, one with an error.
            second.succeeded();
            drop(second);
            let one = requests.pending();
            assert_eq!((one.requests, one.done), (1, 1));
            assert!(one.oldest >= both.oldest, "{one:?}");
            drop(first);
            assert_eq!(requests.pending(), Pending { done: 1, ..Pending::default() });
        }
    }
}
