//! Partitions of a volume, and names that lead to it, go with it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use wb_tests::{LoopDevice, MIB, Volume, needs_serving, overwrite, succeeds, wait_for};

/// A partition table of the old kind with one partition.
fn partition_table() -> Vec<u8> {
    let mut table = vec![0; 512];
    table[446 + 4] = 0x83;
    table[446 + 8..446 + 12].copy_from_slice(&2048u32.to_le_bytes());
    table[446 + 12..446 + 16].copy_from_slice(&8192u32.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    table
}

fn partitions(device: &Path) -> Vec<PathBuf> {
    let name = device.file_name().expect("a device").to_str().expect("UTF-8");
    let found =
        std::fs::read_dir(Path::new("/sys/class/block").join(name)).into_iter().flatten().flatten();
    let is_partition = |path: &PathBuf| path.join("partition").exists();
    found.map(|entry| entry.path()).filter(is_partition).collect()
}

/// Whether this kernel reads such tables.
fn is_read_by_the_kernel(image: &Path) -> bool {
    let device = LoopDevice::attach(image).expect("a loop device");
    let _ = Command::new("partx").arg("--delete").arg(&device.path).output();
    let scanned =
        Command::new("losetup").args(["--find", "--show", "--partscan"]).arg(image).output();
    let path =
        PathBuf::from(String::from_utf8(scanned.expect("losetup").stdout).expect("UTF-8").trim());
    let found = !partitions(&path).is_empty();
    succeeds(Command::new("losetup").arg("--detach").arg(&path));
    found
}

#[test]
fn the_partitions_of_a_volume_are_shown_and_none_stays_behind() {
    needs_serving!("partx", "losetup");
    let volume = Volume::created(16, 32 * MIB);
    overwrite(&volume.backing, 0, &partition_table());
    let by_kernel = is_read_by_the_kernel(&volume.backing);
    for is_killed in [false, true] {
        let attached = volume.attach_with(&[]);
        let device = attached.device.clone();
        let shows =
            Path::new("/sys/class/block").join(device.file_name().unwrap()).join("loop/partscan");
        assert_eq!(std::fs::read_to_string(shows).unwrap().trim(), "1");
        if by_kernel {
            assert_eq!(partitions(&device).len(), 1, "the kernel reads the table");
        } else {
            succeeds(Command::new("partx").arg("--add").arg(&device));
            assert_eq!(partitions(&device).len(), 1, "partx adds it");
        }
        if is_killed {
            attached.crash();
        } else {
            attached.detach(&[]);
        }
        assert!(volume.is_gone());
        assert!(wait_for(|| partitions(&device).is_empty()), "{:?}", partitions(&device));
    }
    // Attached anew, it has its own.
    let attached = volume.attach_with(&[]);
    assert_eq!(partitions(&attached.device).len(), usize::from(by_kernel));
    attached.detach(&[]);
}

#[test]
fn a_volume_is_not_detached_while_a_partition_is_in_use_and_it_is_said_which() {
    needs_serving!("partx", "mkfs.ext4");
    let volume = Volume::created(16, 32 * MIB);
    overwrite(&volume.backing, 0, &partition_table());
    let mut attached = volume.attach_with(&[]);
    if partitions(&attached.device).is_empty() {
        succeeds(Command::new("partx").arg("--add").arg(&attached.device));
    }
    let partition = PathBuf::from(format!("{}p1", attached.device_str()));
    let refused = |why: &str| {
        let refused = volume.wbctl(&["detach", &volume.name]);
        assert!(refused.code == 1 && refused.stderr.contains(why), "{why}: {refused:?}");
    };
    succeeds(Command::new("mkfs.ext4").arg("-q").arg(&partition));
    let on = volume.path("partition");
    std::fs::create_dir(&on).unwrap();
    succeeds(Command::new("mount").arg(&partition).arg(&on));
    std::fs::write(on.join("file"), "kept").unwrap();
    refused(&format!("mounted on {} (its partition {})", on.display(), partition.display()));
    wb_tests::unmount(&on);
    let mut program =
        Command::new("sleep").arg("1000").stdin(File::open(&partition).unwrap()).spawn().unwrap();
    refused(&format!("open in sleep (process {})", program.id()));
    program.kill().unwrap();
    program.wait().unwrap();
    assert!(wait_for(|| volume.wbctl(&["detach", "--drain", &volume.name]).code == 0));
    assert_eq!(attached.wait().code(), Some(0), "{}", attached.stderr());
    let content = std::fs::read(&volume.backing).unwrap();
    assert!(
        content.windows(4).any(|bytes| bytes == b"kept"),
        "what was written to the partition is on the disk"
    );
}

/// Links in /dev/wb that go away with this value.
struct Links(Vec<PathBuf>);

impl Drop for Links {
    fn drop(&mut self) {
        for link in &self.0 {
            let _ = std::fs::remove_file(link);
        }
    }
}

#[test]
fn no_name_of_another_volume_leads_to_the_loop_device_that_an_attach_gets() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    std::fs::create_dir_all("/dev/wb").unwrap();
    // As if daemons had been killed that had every one of the first loop devices, linked by them or
    // by udev.
    let link = |n: u32| Path::new("/dev/wb").join(format!("{}-stale-{n}", volume.name));
    let links = Links((0..256).map(link).collect());
    for (n, link) in links.0.iter().enumerate() {
        let to =
            if n % 2 == 0 { format!("/dev/loop{}", n / 2) } else { format!("../loop{}", n / 2) };
        std::os::unix::fs::symlink(to, link).unwrap();
    }
    let attached = volume.attach_with(&[]);
    let leads_here =
        |link: &&PathBuf| std::fs::canonicalize(link).is_ok_and(|to| to == attached.device);
    assert_eq!(links.0.iter().filter(leads_here).collect::<Vec<_>>(), Vec::<&PathBuf>::new());
    assert_eq!(std::fs::canonicalize(volume.link()).unwrap(), attached.device);
    // What leads elsewhere stays.
    let number = attached.device_str().trim_start_matches("/dev/loop").parse::<usize>().unwrap();
    assert!(number > 127 || links.0.iter().filter(|link| link.is_symlink()).count() > 200);
    attached.detach(&[]);
}
