//! Addresses that are refused.

use super::{SIZE, serve};
use std::net::TcpListener;
use wb_tests::{Volume, free_port};

#[test]
fn an_address_that_others_can_reach_is_refused_before_anything_is_touched() {
    let volume = Volume::created(16, SIZE);
    let before = volume.images();
    let at = format!("nbd://0.0.0.0:{}", free_port());
    let refused = volume.wbctl(&["attach", &volume.name, "--serve", &at]);
    assert_eq!(refused.code, 1, "{refused:?}");
    for expected in ["without TLS", "tls-certificates=FOLDER", "--insecure"] {
        assert!(refused.stderr.contains(expected), "{refused:?}");
    }
    assert_eq!(volume.images(), before);
    assert!(!volume.path("run").exists());
    let attached = serve(&volume, &at, &["--insecure"]);
    attached.detach(&[]);

    let other = Volume::blank(16, SIZE);
    let create =
        [&["create", other.name.as_str(), "--force"], &other.pair()[..], &["--serve", &at]];
    let before = other.images();
    let refused = other.wbctl(&create.concat());
    assert!(refused.code == 1 && refused.stderr.contains("--insecure"), "{refused:?}");
    assert_eq!(other.images(), before);
    other.must(&[&create.concat()[..], &["--insecure"]].concat());
    let record = std::fs::read_to_string(other.record()).unwrap();
    assert!(record.contains("insecure = true") && record.contains(&at), "{record}");
    let attached = other.start(other.command(&["attach", &other.name]));
    attached.detach(&[]);
    // What was allowed for one address is not allowed for another.
    let elsewhere = ["attach", other.name.as_str(), "--serve", "nbd://0.0.0.0:1"];
    assert_eq!(other.wbctl(&elsewhere).code, 1);
}

#[test]
fn an_address_that_makes_no_sense_or_cannot_be_used_is_refused() {
    let volume = Volume::created(16, SIZE);
    for (address, code, why) in [
        ("nbd:/typo", 2, "auto, ublk, loop, or an NBD address"),
        ("ndb://localhost", 2, "must begin with nbd://"),
        ("nbd+unix:///data", 2, "names no socket"),
        ("nbds://localhost", 2, "tls-certificates=FOLDER"),
        ("nbds://localhost?tls-certificates=/nowhere", 1, "/nowhere/ca-cert.pem"),
        ("nbd+unix:///?socket=/nowhere/at/all", 1, "cannot listen on /nowhere/at/all"),
    ] {
        let refused = volume.wbctl(&["attach", &volume.name, "--serve", address]);
        assert_eq!(refused.code, code, "{address}: {refused:?}");
        assert!(refused.stderr.contains(why), "{address}: {refused:?}");
    }
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("nbd://{}", taken.local_addr().unwrap());
    let refused = volume.wbctl(&["attach", &volume.name, "--serve", &address]);
    assert!(refused.code == 1 && refused.stderr.contains("in use"), "{refused:?}");
    let file = volume.path("mine");
    std::fs::write(&file, "mine").unwrap();
    let address = format!("nbd+unix:///?socket={}", file.display());
    assert_eq!(volume.wbctl(&["attach", &volume.name, "--serve", &address]).code, 1);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
    // A relative path counts from where the user is.
    let mut attach = volume.command(&["attach", &volume.name, "--serve", "nbd+unix:///?socket=s"]);
    attach.current_dir(volume.dir.path());
    let attached = volume.start(attach);
    assert_eq!(
        attached.device_str(),
        format!("nbd+unix:///?socket={}/s", volume.dir.path().display())
    );
    attached.detach(&[]);
}
