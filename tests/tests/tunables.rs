//! Tunables are looked at and changed, on an attached volume and a detached one.

use wb_tests::{MIB, Volume, needs_serving};

const KEY: &str = "nr_max_batched_writeback";

#[test]
fn an_attached_volume_takes_a_tunable_at_once_and_keeps_it_when_asked_to() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let name = volume.name.as_str();
    let attached = volume.attach_with(&[]);
    assert_eq!(volume.must(&["set", name, &format!("{KEY}=5")]), format!("{KEY}=5\n"));
    assert_eq!(volume.must(&["get", name, KEY]), format!("{KEY}=5\n"));
    assert_eq!(volume.status()["live"]["tunables"][KEY], 5);
    attached.detach(&[]);
    let attached = volume.attach_with(&[]);
    assert_eq!(volume.must(&["get", name, KEY]), format!("{KEY}=4096\n"), "it was not to be kept");
    volume.must(&["set", "--save", name, &format!("{KEY}=6")]);
    attached.detach(&[]);
    let _attached = volume.attach_with(&[]);
    let json: serde_json::Value =
        serde_json::from_str(&volume.must(&["get", name, "--json"])).unwrap();
    assert_eq!(json[KEY], 6);
}

#[test]
fn of_several_tunables_all_are_set_or_none() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let name = volume.name.as_str();
    let _attached = volume.attach_with(&[]);
    let before = std::fs::read(volume.record()).unwrap();
    for (bad, why) in [
        (format!("{KEY}=0"), "must be a number from 1 to 4096"),
        (format!("{KEY}=4097"), "must be a number from 1 to 4096"),
        ("colour=1".into(), "unknown tunable 'colour'; known: "),
        (KEY.into(), "must be KEY=VALUE"),
    ] {
        let refused = volume.wbctl(&["set", "--save", name, &format!("{KEY}=5"), &bad]);
        assert_eq!((refused.code, refused.stdout.as_str()), (1, ""), "{refused:?}");
        assert!(refused.stderr.contains(why), "{refused:?}");
    }
    assert_eq!(volume.must(&["get", name, KEY]), format!("{KEY}=4096\n"));
    assert_eq!(std::fs::read(volume.record()).unwrap(), before);
}

#[test]
fn the_daemon_itself_refuses_what_is_out_of_range() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let _attached = volume.attach_with(&[]);
    let mut client = libwb::control::Client::connect(&volume.socket()).unwrap();
    let tunables = [(KEY.to_string(), libwb::cache::TunableValue::Number(5000))].into();
    let reply = client.ask(&libwb::control::Request::Set { tunables }, |_| ()).unwrap();
    let libwb::control::Reply::Error { message } = reply else { panic!("{reply:?}") };
    assert!(message.contains("must be a number from 1 to 4096"), "{message}");
}

#[test]
fn saving_keeps_the_rest_of_the_record_and_works_on_a_detached_volume() {
    let volume = Volume::created(8, 8 * MIB);
    let name = volume.name.as_str();
    let good = std::fs::read_to_string(volume.record()).unwrap();
    for tunables in [
        format!("[tunables]\n# of the night shift\n{KEY} = 9 # slow\n"),
        format!("tunables = {{ {KEY} = 9 }} # in a line\n"),
    ] {
        std::fs::write(volume.record(), format!("# by hand\n{good}{tunables}")).unwrap();
        assert_eq!(volume.must(&["get", name, KEY]), format!("{KEY}=9\n"));
        volume.must(&["set", name, &format!("{KEY}=11"), "--save"]);
        let expected = format!("# by hand\n{good}{}", tunables.replace('9', "11"));
        assert_eq!(std::fs::read_to_string(volume.record()).unwrap(), expected);
        assert_eq!(volume.must(&["get", name, KEY]), format!("{KEY}=11\n"));
    }
    assert_eq!(
        std::fs::read_dir(volume.path("config")).unwrap().count(),
        1,
        "no other file is left"
    );
}

#[test]
fn what_cannot_be_got_or_set_is_said() {
    let volume = Volume::created(8, 8 * MIB);
    let name = volume.name.as_str();
    for (args, why) in [
        (&["get", "nobody"][..], "no volume 'nobody' is attached or recorded"),
        (&["get", name, "colour"], "unknown tunable 'colour'; known: "),
        (
            &["set", name, "nr_max_batched_writeback=5"],
            "is not attached; with --save, it is recorded",
        ),
        (
            &["set", "nobody", "nr_max_batched_writeback=5", "--save"],
            "no volume 'nobody' is recorded in",
        ),
    ] {
        let refused = volume.wbctl(args);
        assert_eq!((refused.code, refused.stdout.as_str()), (1, ""), "{refused:?}");
        assert!(refused.stderr.contains(why) && refused.stderr.lines().count() == 1, "{refused:?}");
    }
}
