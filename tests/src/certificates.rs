//! Certificates for tests of TLS.

use crate::succeeds;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes a certificate authority with openssl, and certificates of a server on this machine and of
/// a client, in the folders `server` and `client` within a folder. Returns these two. Each has the
/// files that libnbd and QEMU know.
///
/// # Panics
/// When openssl fails.
pub fn certificates(within: &Path) -> [PathBuf; 2] {
    let folders = ["server", "client"].map(|name| within.join(name));
    let authority = within.join("authority");
    for folder in folders.iter().chain([&authority]) {
        std::fs::create_dir_all(folder).expect("a new folder");
    }
    let text = |path: PathBuf| path.to_str().expect("UTF-8").to_string();
    let [key, own] = ["key.pem", "cert.pem"].map(|file| text(authority.join(file)));
    let make = |more: &[&str]| {
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-x509", "-nodes", "-days", "9", "-newkey", "ec"]);
        openssl.args(["-pkeyopt", "ec_paramgen_curve:prime256v1"]).args(more);
        succeeds(&mut openssl);
    };
    make(&["-keyout", &key, "-out", &own, "-subj", "/CN=authority"]);
    for (folder, name) in folders.iter().zip(["server", "client"]) {
        let [its_key, its] =
            ["key", "cert"].map(|it| text(folder.join(format!("{name}-{it}.pem"))));
        let subject = ["-keyout", &its_key, "-out", &its, "-subj", "/CN=localhost"];
        let names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"];
        let signed = ["-CA", &own, "-CAkey", &key, "-addext", "basicConstraints=critical,CA:FALSE"];
        make(&[&subject[..], &names, &signed].concat());
        std::fs::copy(&own, folder.join("ca-cert.pem")).expect("room for a certificate");
    }
    folders
}
