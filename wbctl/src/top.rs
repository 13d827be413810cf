//! `wbctl top`: a volume at work, on the whole terminal.

mod view;

use crate::client;
use crate::stat::parse_interval;
use crate::volume_paths::VolumeName;
use anyhow::{Context, Result, bail};
use libwb::cli;
use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers, poll, read};
use std::io::IsTerminal;
use std::time::{Duration, Instant};
use view::View;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The volume
    name: VolumeName,
    /// The time between two refreshes, in seconds
    #[arg(value_parser = parse_interval, default_value = "1")]
    interval: Duration,
}

pub(crate) fn top(args: &Args) -> Result<()> {
    if !std::io::stdout().is_terminal() {
        bail!("needs a terminal; for a line each interval, see wbctl stat");
    }
    // For a volume that is not there, prints a line instead of a blank screen.
    let first = client::status(&args.name)?;
    let mut view = View::new(cli::wants_colours(), args.interval);
    view.look(Ok(first));
    let mut terminal = ratatui::try_init().context("cannot use the terminal")?;
    let ended = run(args, &mut view, &mut terminal);
    ratatui::restore();
    ended
}

fn run(args: &Args, view: &mut View, terminal: &mut ratatui::DefaultTerminal) -> Result<()> {
    loop {
        let looked = Instant::now();
        // Waits until the next refresh, and redraws when the window changes.
        while let Some(left) = args.interval.checked_sub(looked.elapsed()) {
            terminal.draw(|frame| frame.render_widget(&*view, frame.area()))?;
            if poll(left)? && quits(&read()?) {
                return Ok(());
            }
        }
        view.look(client::status(&args.name));
    }
}

fn quits(event: &Event) -> bool {
    let Event::Key(KeyEvent { code, modifiers, kind: KeyEventKind::Press, .. }) = event else {
        return false;
    };
    match code {
        KeyCode::Char('q') | KeyCode::Esc => true,
        KeyCode::Char('c') => modifiers.contains(KeyModifiers::CONTROL),
        _ => false,
    }
}
