//! `wrenn image build`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use wrenn_image::{
    BuildRequest, GuestPrograms, Image, ImageError, ImageStore, Progress, Step, StepEvent,
};

use super::{failure, folder, inspect};
use crate::args::OutputArgs;
use crate::commands::Context;
use crate::error::{Failure, require_root};
use crate::exit::Exit;
use crate::guest_programs::guest_programs;
use crate::output::{Printer, duration};
use crate::settings::Settings;
use crate::signals::Signals;

/// Options of `wrenn image build`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name that shall point to the image
    #[arg(default_value = "minimal")]
    name: String,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Builds it and says what came out.
pub(crate) async fn run(args: Args, context: &Context) -> Result<Exit, Failure> {
    let started = Instant::now();
    let image = build(&args.name, &context.settings, &context.printer).await?;
    if args.output.json {
        context.printer.json(&inspect::to_json(&image)?)?;
    } else {
        context
            .printer
            .note(format!("done in {}", duration(started.elapsed())));
        context
            .printer
            .line(format!("{} {}", args.name, image.digest()));
    }
    Ok(Exit::Ok)
}

/// Makes sure that there is an image `name` with the guest programs of this `wrenn` in it.
/// An image of other programs is not changed; `name` then points to a new one.
pub(crate) async fn ensure(
    name: &str,
    settings: &Settings,
    printer: &Printer,
) -> Result<(), Failure> {
    let found = match super::store(settings)? {
        Some(store) => match store.get(name) {
            Ok(image) => Some(image),
            Err(ImageError::NotFound(_)) => None,
            Err(error) => return Err(failure(error)),
        },
        None => None,
    };
    match (found, guest_programs()) {
        // Nothing to compare with; what is there was good once.
        (Some(_), Err(_)) => Ok(()),
        (Some(image), Ok(programs)) => {
            if programs.are_in(&image.manifest.lock) {
                return Ok(());
            }
            printer.note(format!(
                "the image `{name}` has the guest programs of another wrenn; building a new one"
            ));
            build(name, settings, printer).await.map(|_| ())
        }
        (None, _) => {
            printer.note(format!(
                "there is no image `{name}` yet; building it (once, about a minute)"
            ));
            build(name, settings, printer).await.map(|_| ())
        }
    }
}

/// Builds image `name` and shows the progress. A signal ends the build, which cleans up.
async fn build(name: &str, settings: &Settings, printer: &Printer) -> Result<Image, Failure> {
    require_root("building an image")?;
    let programs = guest_programs()?;
    let mut signals = Signals::listen()
        .map_err(|error| Failure::message(format!("cannot listen for signals: {error}")))?;
    let folder = folder(&settings.data_dir);
    let name = name.to_owned();
    let cancelled = Arc::new(AtomicBool::new(false));
    let drawing = Drawing::new(*printer, Arc::clone(&cancelled));
    let mut work = tokio::task::spawn_blocking(move || -> Result<Image, ImageError> {
        let request = BuildRequest {
            name: &name,
            programs: GuestPrograms {
                init: programs.init,
                envd: programs.envd,
            },
        };
        let image = ImageStore::open(folder)?.build(request, &drawing);
        drawing.clear();
        image
    });
    let (outcome, exit) = tokio::select! {
        outcome = &mut work => (outcome, Exit::Failed),
        signal = signals.next() => {
            cancelled.store(true, Ordering::Relaxed);
            (work.await, Exit::Signal(signal))
        }
    };
    match outcome {
        Ok(image) => image.map_err(|error| failure(error).exit(exit)),
        Err(error) => Err(Failure::message(format!(
            "the image build broke off: {error}"
        ))),
    }
}

/// Shows a build: a line for each step that is done, and a bar for the one under way.
struct Drawing {
    printer: Printer,
    cancelled: Arc<AtomicBool>,
    bar: Mutex<Option<(Step, ProgressBar)>>,
}

impl Drawing {
    fn new(printer: Printer, cancelled: Arc<AtomicBool>) -> Self {
        Drawing {
            printer,
            cancelled,
            bar: Mutex::new(None),
        }
    }

    fn clear(&self) {
        if let Ok(mut bar) = self.bar.lock()
            && let Some((_, bar)) = bar.take()
        {
            bar.finish_and_clear();
        }
    }

    fn animate(&self, event: StepEvent) {
        // Nobody panics with it in hand; and a bar is not worth a panic.
        let Ok(mut current) = self.bar.lock() else {
            return;
        };
        if current.as_ref().is_none_or(|(step, _)| *step != event.step) {
            if let Some((_, bar)) = current.take() {
                bar.finish_and_clear();
            }
            *current = Some((event.step, start_bar(event.step)));
        }
        let Some((_, bar)) = current.as_ref() else {
            return;
        };
        match event.fraction {
            // Tenths of a percent.
            Some(fraction) => {
                bar.set_length(1000);
                bar.set_position((fraction * 1000.0) as u64);
            }
            None => bar.unset_length(),
        }
    }
}

fn start_bar(step: Step) -> ProgressBar {
    let bar = ProgressBar::no_length();
    bar.set_draw_target(ProgressDrawTarget::stderr());
    if let Ok(style) =
        ProgressStyle::with_template("{prefix} {msg:24} {bar:24.cyan/dim} {elapsed:.dim}")
    {
        bar.set_style(style.progress_chars("━╸─"));
    }
    bar.set_prefix(place(step));
    bar.set_message(step.title());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// `[2/6]`
fn place(step: Step) -> String {
    format!("[{}/{}]", step.index() + 1, Step::ALL.len())
}

impl Progress for Drawing {
    fn step(&self, event: StepEvent) {
        if event.done {
            self.clear();
            let took = duration(event.elapsed);
            self.printer.note(format!(
                "{} {:24} {took:>8}",
                place(event.step),
                event.step.title()
            ));
        } else if self.printer.animates() {
            self.animate(event);
        }
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}
