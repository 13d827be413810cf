//! Logs when a device does not answer.

use libwb::cli::{self, human_time};
use libwb::device::{Device, Pending};
use libwb::runtime::thread;
use std::time::Duration;

/// A request that waits longer is worth a warning.
const LONG: Duration = Duration::from_secs(30);
/// How often the thread checks.
const OFTEN: Duration = Duration::from_secs(5);

/// Watches devices as long as the process lives.
pub(crate) fn start(devices: [Device; 2]) {
    let watch = move || {
        let mut watches = [Watch::default(), Watch::default()];
        loop {
            for (device, watch) in devices.iter().zip(&mut watches) {
                // Its client tells that a link is down.
                if device.link().is_some_and(|link| link.down_for.is_some()) {
                    continue;
                }
                match watch.look(&device.pending()) {
                    Some(News::Hangs(text)) => tracing::warn!("{}: {text}", device.name()),
                    Some(News::Answers) => tracing::info!("{}: answers again", device.name()),
                    None => {}
                }
            }
            std::thread::sleep(OFTEN);
        }
    };
    if let Err(e) = thread("wb-watch").spawn(watch) {
        tracing::warn!("cannot watch for devices that hang: {e}");
    }
}

#[derive(Debug, PartialEq)]
enum News {
    Hangs(String),
    Answers,
}

/// What is known of one device.
#[derive(Default)]
struct Watch {
    hangs: bool,
}

impl Watch {
    fn look(&mut self, pending: &Pending) -> Option<News> {
        let oldest = pending.oldest.filter(|&oldest| oldest > LONG);
        let hung = std::mem::replace(&mut self.hangs, oldest.is_some());
        match oldest {
            Some(oldest) if !hung => Some(News::Hangs(format!(
                "the device does not answer: {} in flight, the oldest for {}; the volume waits \
                 for it",
                cli::count(pending.requests, "request"),
                human_time(oldest.as_secs_f64())
            ))),
            None if hung => Some(News::Answers),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_does_not_answer_is_told_once_and_so_is_its_return() {
        let mut watch = Watch::default();
        let mut look = |requests, seconds: Option<u64>| {
            watch.look(&Pending { requests, oldest: seconds.map(Duration::from_secs), done: 0 })
        };
        assert_eq!(look(0, None), None);
        assert_eq!(look(9, Some(30)), None);
        let Some(News::Hangs(text)) = look(2, Some(31)) else { panic!("it is not told") };
        assert!(text.contains("2 requests in flight, the oldest for 31"), "{text}");
        assert_eq!(look(2, Some(36)), None, "it was told");
        // Other requests, which are new.
        assert_eq!(look(3, Some(1)), Some(News::Answers));
        assert_eq!(look(0, None), None);
        assert!(matches!(look(1, Some(90)), Some(News::Hangs(_))));
    }
}
