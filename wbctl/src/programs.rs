//! The programs that the server of a volume may be.

use std::fs::Metadata;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// This very program, whatever is installed by now.
pub(crate) const SELF: &str = "/proc/self/exe";

/// The programs that a server may be, the preferred one first, and which one it is.
pub(crate) struct Programs {
    installed: PathBuf,
    /// The one before the last restart, if no server of a later one has served.
    before: Option<PathBuf>,
    chosen: usize,
}

impl Programs {
    /// `before` is the descriptor of a program that may be deleted.
    pub(crate) fn new(installed: PathBuf, before: Option<BorrowedFd<'_>>) -> Programs {
        let before = before.map(|it| format!("/proc/self/fd/{}", it.as_raw_fd()).into());
        Programs { installed, before, chosen: 0 }
    }

    fn all(&self) -> Vec<&Path> {
        let first = [self.installed.as_path(), Path::new(SELF)];
        first.into_iter().chain(self.before.as_deref()).collect()
    }

    pub(crate) fn installed(&self) -> &Path {
        &self.installed
    }

    pub(crate) fn chosen(&self) -> &Path {
        self.all()[self.chosen]
    }

    /// Whether the chosen one is what is installed.
    pub(crate) fn is_installed(&self) -> bool {
        let is_same = || {
            let [one, other] = [SELF.as_ref(), self.installed.as_path()].map(std::fs::metadata);
            let place = |file: &Metadata| (file.dev(), file.ino());
            matches!((&one, &other), (Ok(one), Ok(other)) if place(one) == place(other))
        };
        self.chosen == 0 || self.chosen == 1 && is_same()
    }

    pub(crate) fn choose_first(&mut self) {
        self.chosen = 0;
    }

    /// Chooses the next one; false if there is none.
    pub(crate) fn choose_next(&mut self) -> bool {
        let more = self.chosen + 1 < self.all().len();
        self.chosen += usize::from(more);
        more
    }

    /// The chosen one serves. Returns whether the one before the last restart is needed no more.
    pub(crate) fn forget_before(&mut self) -> bool {
        let is_needed = self.before.as_deref() == Some(self.chosen());
        if !is_needed {
            self.before = None;
        }
        !is_needed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn the_program_before_a_restart_is_kept_until_another_one_serves() {
        let null = File::open("/dev/null").unwrap();
        let mut programs = Programs::new("/new".into(), Some(null.as_fd()));
        assert!(programs.is_installed());
        assert!(programs.choose_next() && !programs.is_installed(), "this is a test");
        let this = std::env::current_exe().unwrap();
        let mut same = Programs::new(this, None);
        assert!(same.choose_next() && same.is_installed(), "by another name");
        assert!(programs.choose_next() && !programs.choose_next());
        assert!(!programs.forget_before(), "it serves itself");
        assert!(programs.chosen().starts_with("/proc/self/fd"));
        programs.choose_first();
        assert!(programs.forget_before());
        assert!(programs.choose_next() && !programs.choose_next());
    }
}
