//! Writes the inputs that fuzzing starts from: `fuzz-seeds FOLDER`. It makes them from the golden
//! images, so the repository need not keep them.

use std::path::Path;
use std::process::ExitCode;
use wb_tests::damage_script::{DamageScript, seeds};
use wb_tests::fuzzed::requests;
use wb_tests::fuzzed_nbd;

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1) else {
        eprintln!("usage: fuzz-seeds FOLDER");
        return ExitCode::from(2);
    };
    let scripts: Vec<Vec<u8>> = seeds().iter().map(DamageScript::encode).collect();
    // The head as it was left, and one whose first words are others.
    let heads = vec![Vec::new(), (0..44).collect()];
    let targets = [
        ("device", &scripts),
        ("recovery", &scripts),
        ("control", &requests()),
        ("head", &heads),
        ("nbd", &fuzzed_nbd::seeds()),
    ];
    for (target, inputs) in targets {
        if let Err(e) = write(&Path::new(&folder).join(target), inputs) {
            eprintln!("fuzz-seeds: {}: {e}", folder.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn write(folder: &Path, inputs: &[Vec<u8>]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for (nth, input) in inputs.iter().enumerate() {
        std::fs::write(folder.join(format!("{nth:03}")), input)?;
    }
    Ok(())
}
