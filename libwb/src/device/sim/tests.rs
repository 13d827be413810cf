use super::*;
use crate::format::SECTOR_BYTES;
use crate::runtime::Runtime;

fn device(simulation: &Simulation, sectors: usize) -> SimDevice {
    SimDevice::new(simulation.runtime(), "disk", vec![0; sectors * SECTOR_BYTES], 512)
}

fn filled(sectors: usize, with: u8) -> SharedBuf {
    IoBuf::copy_of(&vec![with; sectors * SECTOR_BYTES]).into()
}

/// The first byte of each sector.
fn heads(content: &[u8]) -> Vec<u8> {
    content.chunks(SECTOR_BYTES).map(|sector| sector[0]).collect()
}

#[test]
fn what_was_flushed_survives_and_the_rest_is_any_version() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..200 {
        let simulation = Simulation::new(seed);
        let disk = device(&simulation, 4);
        let course = async {
            disk.write(0, filled(2, 1)).await.unwrap();
            disk.flush().await.unwrap();
            disk.write(512, filled(2, 2)).await.unwrap();
            disk.write(512, filled(1, 3)).await.unwrap();
        };
        simulation.block_on(course).unwrap();
        assert_eq!(heads(&disk.content()), [1, 3, 2, 0]);
        assert_eq!(heads(&disk.durable()), [1, 1, 0, 0]);
        let after = heads(&disk.crash(Crash::PowerCut).content());
        assert_eq!((after[0], after[3]), (1, 0));
        assert!([1, 2, 3].contains(&after[1]) && [0, 2].contains(&after[2]), "{after:?}");
        seen.insert(after);
    }
    assert_eq!(seen.len(), 6, "every outcome comes up: {seen:?}");
}

#[test]
fn a_flush_does_not_cover_what_completed_after_its_submission() {
    let lost = (0..50).any(|seed| {
        let simulation = Simulation::new(seed);
        let disk = device(&simulation, 1);
        let course = async { futures_util::join!(disk.write(0, filled(1, 1)), disk.flush()) };
        simulation.block_on(course).unwrap().0.unwrap();
        heads(&disk.durable()) == [1]
    });
    assert!(!lost);
}

#[test]
fn a_kill_keeps_what_completed_but_does_not_make_it_durable() {
    let simulation = Simulation::new(3);
    let disk = device(&simulation, 2);
    simulation.block_on(disk.write(0, filled(1, 1))).unwrap().unwrap();
    drop(disk.write(512, filled(1, 2)));
    simulation.kill_tasks();
    let disk = disk.crash(Crash::Kill);
    assert_eq!(heads(&disk.content())[0], 1);
    assert_eq!(heads(&disk.durable()), [0, 0]);
}

#[test]
fn a_failed_flush_may_cost_data_that_the_next_flush_does_not_bring_back() {
    let lost = (0..50).any(|seed| {
        let simulation = Simulation::new(seed);
        let disk = device(&simulation, 1);
        simulation.block_on(disk.write(0, filled(1, 1))).unwrap().unwrap();
        disk.set_faults(Faults { flush: 1.0, ..Faults::default() });
        assert_eq!(simulation.block_on(disk.flush()).unwrap().unwrap_err().cause, Errno::EIO);
        disk.set_faults(Faults::default());
        simulation.block_on(disk.flush()).unwrap().unwrap();
        assert_eq!(heads(&disk.content()), [1]);
        heads(&disk.durable()) == [0]
    });
    assert!(lost);
}

/// A disk on which sector 0 was written with 1, and then sector 1 durably with 2.
fn written_durably(simulation: &Simulation) -> SimDevice {
    let disk = device(simulation, 2).preferring_durable_writes(true);
    let course = async {
        disk.write(0, filled(1, 1)).await.unwrap();
        disk.write_durably(512, vec![filled(1, 2)]).await.unwrap();
    };
    simulation.block_on(course).unwrap();
    disk
}

#[test]
fn a_durable_write_survives_and_what_was_written_before_it_may_be_lost() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..50 {
        let disk = written_durably(&Simulation::new(seed));
        assert_eq!(heads(&disk.durable()), [0, 2]);
        let disk = disk.crash(Crash::PowerCut);
        assert!(disk.prefers_durable_writes());
        seen.insert(heads(&disk.content()));
    }
    assert_eq!(seen, [vec![0, 2], vec![1, 2]].into());
}

#[test]
fn a_failed_durable_write_may_cost_what_was_written_before_it() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..100 {
        let simulation = Simulation::new(seed);
        let disk = written_durably(&simulation);
        disk.set_faults(Faults { flush: 1.0, ..Faults::default() });
        let failed = simulation.block_on(disk.write_durably(512, vec![filled(1, 3)])).unwrap();
        assert_eq!(failed.unwrap_err().operation, Operation::DurableWrite);
        disk.set_faults(Faults::default());
        simulation.block_on(disk.flush()).unwrap().unwrap();
        seen.insert(heads(&disk.durable()));
    }
    let all = [0, 1].map(|before| [2, 3].map(|itself| vec![before, itself]));
    assert_eq!(seen, all.into_iter().flatten().collect());
}

#[test]
fn a_deadlock_and_a_stuck_future_are_reported() {
    let simulation = Simulation::new(1);
    assert_eq!(simulation.block_on(std::future::pending::<()>()), Err(Stop::Deadlock));
    let runtime = simulation.runtime().clone();
    let ticking = runtime.clone();
    runtime.spawn(Box::pin(async move {
        loop {
            ticking.sleep(Duration::from_secs(1)).await;
        }
    }));
    assert_eq!(simulation.block_on(std::future::pending::<()>()), Err(Stop::Stuck));
}

#[test]
fn killing_drops_every_task_even_one_that_holds_the_runtime() {
    let simulation = Simulation::new(1);
    let runtime = simulation.runtime().clone();
    let witness = Arc::new(());
    for _ in 0..3 {
        let (held, inner) = (witness.clone(), runtime.clone());
        runtime.spawn(Box::pin(async move {
            inner.sleep(Duration::from_secs(100)).await;
            drop(held);
        }));
    }
    simulation.block_on(runtime.sleep(Duration::from_secs(1))).unwrap();
    assert_eq!(Arc::strong_count(&witness), 4);
    simulation.kill_tasks();
    assert_eq!(Arc::strong_count(&witness), 1);
    assert_eq!(runtime.now(), Duration::from_secs(1));
}

#[test]
fn a_halt_comes_at_the_point_of_io_that_was_asked_for() {
    let simulation = Simulation::new(1);
    let disk = device(&simulation, 1);
    simulation.runtime().halt_after_io(3);
    let course = async {
        disk.write(0, filled(1, 1)).await.unwrap();
        disk.flush().await.unwrap();
    };
    assert_eq!(simulation.block_on(course), Err(Stop::Halted));
    assert_eq!(heads(&disk.content()), [1]);
    assert_eq!(heads(&disk.durable()), [0]);
}

#[test]
fn misaligned_io_fails() {
    let simulation = Simulation::new(1);
    let disk = SimDevice::new(simulation.runtime(), "disk", vec![0; 8192], 4096);
    let failed = simulation.block_on(disk.write(512, filled(8, 1))).unwrap().unwrap_err();
    assert_eq!(failed.cause, Errno::EINVAL);
}
