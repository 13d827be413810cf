//! Volumes of the kernel module's script `writeboost` are taken over.

use libwb::cache::Tunables;
use wb_tests::{Outcome, Volume, needs_serving, sha256_direct};

fn table(volume: &Volume, text: &str) -> String {
    let path = volume.path("writeboosttab");
    std::fs::write(&path, text).expect("what the test needs");
    path.to_str().expect("what the test needs").into()
}

fn records(volume: &Volume) -> usize {
    std::fs::read_dir(volume.path("config")).map_or(0, Iterator::count)
}

fn refuses(volume: &Volume, text: &str, why: &str) -> Outcome {
    let before = records(volume);
    let refused = volume.wbctl(&["import", &table(volume, text)]);
    assert_eq!((refused.code, refused.stdout.as_str()), (1, ""), "{text:?}: {refused:?}");
    assert!(
        refused.stderr.contains(why) && refused.stderr.lines().count() == 1,
        "{text:?}: {refused:?}"
    );
    assert_eq!(records(volume), before, "{text:?}");
    refused
}

#[test]
fn a_volume_of_the_kernel_module_is_imported_and_attached() {
    needs_serving!();
    let volume = Volume::golden("few-1");
    let (cache, backing) = (volume.cache.display(), volume.backing.display());
    let before = volume.images();
    let text = format!(
        "# comment\n\n  {}\t{backing}  \
         {cache}\tnr_max_batched_writeback=8,colour=red,nr_max_batched_writeback=9999\nother \
         /dev/disk/by-id/x /dev/disk/by-id/y write_around_mode\n",
        volume.name
    );
    let table = table(&volume, &text);
    let planned = volume.must(&["import", &table, "--dry-run"]);
    assert_eq!(records(&volume), 0, "a dry run records nothing");
    let done = volume.must(&["import", &table]);
    assert_eq!(planned.replace("would import", "imported"), done);
    for part in [
        format!("imported '{}': {backing} with the cache {cache}\n", volume.name),
        "left out: colour=red: unknown tunable 'colour'".into(),
        "left out: nr_max_batched_writeback=9999: nr_max_batched_writeback=9999: must be a number \
         from 1"
            .into(),
        "left out: write_around_mode: ".into(),
        "dmsetup remove NAME".into(),
        "wbctl attach NAME".into(),
    ] {
        assert!(done.contains(&part), "{part:?} is not in {done}");
    }
    assert_eq!(volume.images(), before);
    assert_eq!(
        volume.must(&["get", &volume.name, "nr_max_batched_writeback"]),
        "nr_max_batched_writeback=8\n"
    );
    assert_eq!(records(&volume), 2);
    let attached = volume.attach_with(&[]);
    assert_eq!(sha256_direct(&attached.device), wb_tests::golden_volume_sha256("few-1"));
}

#[test]
fn nothing_is_imported_of_a_table_that_makes_no_sense() {
    let volume = Volume::blank(8, 8 << 20);
    refuses(&volume, "", "lists no volume");
    refuses(&volume, "good /dev/a /dev/b\nbad /dev/c\n", "line 2: must be: NAME BACKING CACHE");
    refuses(
        &volume,
        "good /dev/a /dev/b\n../x /dev/c /dev/d\n",
        "line 2: '../x': a volume name is",
    );
    refuses(&volume, "good /dev/a /dev/b x=1 y=2\n", "line 1: 'y=2' follows the options");
    refuses(&volume, "good /dev/a b\n", "'b' is not the path of a device");
    refuses(&volume, &"x".repeat(2 << 20), "longer than 1048576 bytes");
    let missing = volume.wbctl(&["import", "/no/such/table"]);
    assert!(
        missing.code == 1 && missing.stderr.contains("cannot read /no/such/table"),
        "{missing:?}"
    );
}

#[test]
fn a_name_that_exists_is_not_imported_again() {
    let volume = Volume::created(8, 8 << 20);
    let text = format!("other /dev/a /dev/b\n{} /dev/c /dev/d\n", volume.name);
    let refused = refuses(&volume, &text, "exists already: it is recorded in");
    let way_on =
        format!("first run: wbctl remove {0}; or remove the line of '{0}' from ", volume.name);
    assert!(refused.stderr.contains(&way_on), "{refused:?}");
}

#[test]
fn a_device_of_another_volume_is_not_imported() {
    let volume = Volume::created(8, 8 << 20);
    let (cache, backing) = (volume.cache.display(), volume.backing.display());
    let why = format!(
        "belongs to the volume '{0}'; to give that up, first run: wbctl remove {0}; ",
        volume.name
    );
    for devices in
        [format!("/dev/a {cache}"), format!("{backing} /dev/b"), format!("{cache} /dev/b")]
    {
        let refused = refuses(&volume, &format!("other /dev/c /dev/d\nnew {devices}\n"), &why);
        assert!(refused.stderr.contains("remove the line of 'new' from"), "{refused:?}");
    }
    volume.must(&["remove", &volume.name]);
    volume.must(&["import", &table(&volume, &format!("new {backing} {cache}\n"))]);
}

#[test]
fn every_tunable_of_wb_is_taken_from_a_table() {
    let volume = Volume::blank(8, 8 << 20);
    let options: Vec<String> =
        Tunables::default().pairs().map(|(key, value)| format!("{key}={value}")).collect();
    let table = table(&volume, &format!("v /dev/a /dev/b {}\n", options.join(",")));
    let done = volume.must(&["import", &table]);
    assert!(!done.contains("left out"), "{done}");
}
