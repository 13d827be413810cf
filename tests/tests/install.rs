//! What `make install` and the Debian package put in place, and that nothing of it is left behind.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use wb_tests::{Outcome, bin, has_program, skip};

const PROGRAMS: [&str; 4] = ["wbctl", "wbformat", "wbcheck", "wbdump"];

/// What is installed, apart from the folder of `PREFIX` and that of systemd and udev.
fn wanted(prefix: &str) -> BTreeSet<String> {
    let mut files: BTreeSet<String> = PROGRAMS
        .iter()
        .flat_map(|name| {
            [
                format!("{prefix}/bin/{name}"),
                format!("{prefix}/share/man/man8/{name}.8"),
                format!("{prefix}/share/bash-completion/completions/{name}"),
                format!("{prefix}/share/zsh/vendor-completions/_{name}"),
                format!("{prefix}/share/fish/vendor_completions.d/{name}.fish"),
            ]
        })
        .collect();
    files.extend(["5", "7"].map(|section| format!("{prefix}/share/man/man{section}/wb.{section}")));
    files.insert("usr/lib/udev/rules.d/60-wb.rules".into());
    files.insert("usr/lib/systemd/system/wb@.service".into());
    files
}

/// The files below a folder, by their paths from there.
fn files(folder: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).expect("a folder that was installed") {
            let path = entry.expect("a folder that was installed").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let path = path.strip_prefix(folder).expect("a path below the folder");
                found.insert(path.to_str().expect("UTF-8").into());
            }
        }
    }
    found
}

/// A target folder that holds what `make build` makes, of the programs as they were built last.
fn target(dir: &TempDir) -> PathBuf {
    let target = dir.path().join("target");
    let release = target.join("release");
    fs::create_dir_all(&release).expect("a new folder");
    for name in PROGRAMS {
        symlink(bin(name), release.join(name)).expect("a new link");
    }
    let mut manual = Command::new(bin("manual"));
    manual.arg(release.join("share"));
    assert_eq!(Outcome::of(manual).code, 0);
    target
}

fn make(target: &Path, args: &[&str]) -> Outcome {
    let mut make = Command::new("make");
    make.arg("-C").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).args(args);
    make.env("CARGO_TARGET_DIR", target).env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
    Outcome::of(make)
}

#[test]
fn what_make_installs_works_and_is_uninstalled_without_a_rest() {
    let dir = TempDir::new().unwrap();
    let target = target(&dir);
    for prefix in ["usr", "usr/local"] {
        let root = dir.path().join("root").join(prefix.replace('/', "-"));
        let options = [format!("DESTDIR={}", root.display()), format!("PREFIX=/{prefix}")];
        let [destination, prefix_option] = options.each_ref().map(String::as_str);
        let installed = make(&target, &["install", destination, prefix_option]);
        assert_eq!(installed.code, 0, "{installed:?}");
        assert_eq!(files(&root), wanted(prefix));
        for file in files(&root) {
            let mode = fs::metadata(root.join(&file)).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, if file.contains("/bin/") { 0o755 } else { 0o644 }, "{file}");
        }
        let version =
            Command::new(root.join(prefix).join("bin/wbctl")).arg("--version").output().unwrap();
        assert!(version.status.success(), "{version:?}");
        let unit = fs::read_to_string(root.join("usr/lib/systemd/system/wb@.service")).unwrap();
        assert!(unit.contains(&format!("ExecStart=/{prefix}/bin/wbctl attach")), "{unit}");

        // What is another's stays, in a folder of ours too.
        let others = root.join(prefix).join("share/man/man8/other.8");
        fs::write(&others, "").unwrap();
        let uninstalled = make(&target, &["uninstall", destination, prefix_option]);
        assert_eq!(uninstalled.code, 0, "{uninstalled:?}");
        assert_eq!(files(&root), BTreeSet::from([format!("{prefix}/share/man/man8/other.8")]));
    }
}

#[test]
fn without_a_build_nothing_is_installed_and_what_to_do_is_said() {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("root");
    let destination = format!("DESTDIR={}", root.display());
    let says = |target: &Path, missing: &str| {
        let refused = make(target, &["install", &destination]);
        assert_ne!(refused.code, 0, "{refused:?}");
        let file = target.join("release").join(missing);
        let why = format!("make install: there is no {}; first: make build", file.display());
        assert!(refused.stderr.contains(&why), "{refused:?}");
        assert!(!root.exists(), "nothing is installed");
    };
    says(&dir.path().join("nothing"), "wbctl");
    let target = target(&dir);
    fs::remove_file(target.join("release/wbdump")).unwrap();
    says(&target, "wbdump");
}

/// Runs dpkg on a system of its own below `root`.
fn dpkg(root: &Path, args: &[&str]) -> Outcome {
    let mut dpkg = Command::new("dpkg");
    // The libraries that it depends on are those of this machine.
    dpkg.arg(format!("--root={}", root.display()))
        .args(["--force-depends", "--force-not-root", "--force-script-chrootless"])
        .args(args);
    // It asks for programs that need not be in the path of a user.
    dpkg.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    Outcome::of(dpkg)
}

#[test]
fn the_debian_package_is_installed_and_removed_without_a_rest() {
    if let Some(program) =
        ["cargo-deb", "dpkg", "strip"].into_iter().find(|program| !has_program(program))
    {
        skip!("needs {program}; `make deb` installs cargo-deb");
    }
    let dir = TempDir::new().unwrap();
    let target = target(&dir);
    let packed = make(&target, &["package"]);
    assert_eq!(packed.code, 0, "{packed:?}");
    let package = fs::read_dir(target.join("debian")).unwrap().next().unwrap().unwrap().path();

    let root = dir.path().join("root");
    fs::create_dir_all(root.join("var/lib/dpkg/info")).unwrap();
    fs::create_dir_all(root.join("var/lib/dpkg/updates")).unwrap();
    fs::write(root.join("var/lib/dpkg/status"), "").unwrap();
    let of_wb = |root: &Path| -> BTreeSet<String> {
        files(root).into_iter().filter(|file| !file.starts_with("var/")).collect()
    };
    let installed = dpkg(&root, &["--install", package.to_str().unwrap()]);
    assert_eq!(installed.code, 0, "{installed:?}");
    let mut expected = wanted("usr");
    for name in ["copyright", "README.md", "CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE"] {
        expected.insert(format!("usr/share/doc/wb/{name}"));
    }
    assert_eq!(of_wb(&root), expected);
    let version = Command::new(root.join("usr/bin/wbcheck")).arg("--version").output().unwrap();
    assert!(version.status.success(), "{version:?}");

    // An upgrade says what an attached volume needs.
    assert!(!installed.stdout.contains("wbctl restart"), "{installed:?}");
    let run = root.join("run/wb/volume");
    fs::create_dir_all(&run).unwrap();
    let socket = UnixListener::bind(run.join("socket")).unwrap();
    let upgraded = dpkg(&root, &["--install", package.to_str().unwrap()]);
    assert!(upgraded.code == 0 && upgraded.stdout.contains("wbctl restart NAME"), "{upgraded:?}");
    drop(socket);
    fs::remove_dir_all(root.join("run")).unwrap();

    let removed = dpkg(&root, &["--purge", "wb"]);
    assert_eq!(removed.code, 0, "{removed:?}");
    assert_eq!(of_wb(&root), BTreeSet::new());
}
