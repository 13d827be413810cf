//! The files of an attached volume are deleted or replaced: that is noticed, and what was lost by
//! it is not called kept.

use nix::sys::signal::Signal;
use std::path::{Path, PathBuf};
use wb_tests::{MIB, Volume, needs_serving, noise, overwrite};

/// What is done to a file, and what is said of it then.
type Harm = (fn(&Path), &'static str);

const HARMS: [Harm; 3] = [
    (|path| std::fs::remove_file(path).expect("a file"), "the file was deleted"),
    (
        |path| {
            let new = path.with_extension("new");
            std::fs::copy(path, &new).and_then(|_| std::fs::rename(&new, path)).expect("a file");
        },
        "the file was deleted",
    ),
    (
        |path| {
            std::fs::rename(path, path.with_extension("old")).expect("a file");
            std::fs::write(path, "another").expect("a new file");
        },
        "another file has taken its place",
    ),
];

/// The path of one of the two files.
type Which = fn(&Volume) -> PathBuf;

const BOTH: [Which; 2] = [|volume| volume.cache.clone(), |volume| volume.backing.clone()];

#[test]
fn status_tells_of_a_file_that_is_gone_and_detach_does_not_report_success() {
    needs_serving!();
    for which in BOTH {
        for (harm, what) in HARMS {
            let volume = Volume::created(16, 16 * MIB);
            let path = which(&volume);
            let mut attached = volume.attach_with(&["writeback_threshold=0"]);
            overwrite(&attached.device, 0, &noise(1, 2 * MIB));
            std::fs::File::open(&attached.device).unwrap().sync_all().unwrap();
            assert_eq!(volume.wbctl(&["status", &volume.name]).code, 0);
            harm(&path);
            let said = format!("{}: {what}", path.display());
            let status = volume.status();
            let message = status["message"].as_str().unwrap_or_default();
            assert!(status["state"] == "degraded" && message.contains(&said), "{status}");
            let shown = volume.wbctl(&["status", &volume.name]);
            assert!(shown.code == 5 && shown.stdout.contains(what), "{shown:?}");
            let refused = volume.wbctl(&["detach", &volume.name]);
            assert!(refused.code == 1 && refused.stdout.is_empty(), "{refused:?}");
            let fates = ["gone with it", "in the one that was open"];
            let tells_fate = fates.iter().any(|fate| refused.stderr.contains(fate));
            assert!(refused.stderr.contains(&said) && tells_fate, "{refused:?}");
            let has_dirty = path == volume.cache;
            assert_eq!(
                refused.stderr.contains("2 MiB that were only there"),
                has_dirty,
                "{refused:?}"
            );
            assert_eq!(attached.wait().code(), Some(1), "{}", attached.stderr());
        }
    }
}

#[test]
fn a_daemon_that_is_told_to_end_by_a_signal_fails_too() {
    needs_serving!();
    for which in BOTH {
        let volume = Volume::created(16, 16 * MIB);
        let mut attached = volume.attach_with(&["writeback_threshold=0"]);
        overwrite(&attached.device, 0, &noise(1, MIB));
        std::fs::remove_file(which(&volume)).unwrap();
        attached.signal(Signal::SIGTERM);
        assert_eq!(attached.wait().code(), Some(1));
        assert!(attached.stderr().contains("the file was deleted"), "{}", attached.stderr());
    }
}

#[test]
fn a_file_that_is_found_by_another_name_is_not_gone() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let attached = volume.attach_with(&[]);
    for path in [&volume.cache, &volume.backing] {
        let other = path.with_extension("moved");
        std::fs::rename(path, &other).unwrap();
        let status = volume.status();
        assert!(status["state"] == "degraded", "{status}");
        std::os::unix::fs::symlink(&other, path).unwrap();
        assert_eq!(volume.status()["state"], "attached");
    }
    attached.detach(&["--drain"]);
}
