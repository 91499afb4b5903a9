// SPDX-License-Identifier: GPL-2.0-only

use crate::{Log, Messages, context::lock};
use anyhow::{Context as _, Result};
use events::{Begin, Event, Run, Sink, TestResult, VERSION, Verdict};
use mdev_dma::sysfs::MdevType;
use std::{
    env,
    fs::File,
    io::Write,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Instant,
};
use tempfile::NamedTempFile;

/// Where events go.
#[derive(clap::Args)]
pub struct Output {
    /// Write all that happens to this file, too, a JSON object on each line: see
    /// Documentation/events.rst
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,

    /// Write it to the memory of this file, such as the BAR of a device that the host shares, and
    /// print nothing
    #[arg(long, value_name = "FILE", conflicts_with = "events")]
    log: Option<PathBuf>,
}

impl Output {
    /// Begins a run. `print` gets its events, unless they go to memory.
    pub fn begin(
        &self,
        engine: &str,
        planned: usize,
        skip: Option<String>,
        print: Sink,
    ) -> Result<Recorder> {
        let mut sinks = Vec::new();
        if self.log.is_none() {
            sinks.push(print);
        }
        if let Some(path) = &self.events {
            let mut file = File::create(path).with_context(|| path.display().to_string())?;
            sinks.push(Box::new(move |event| writeln!(file, "{}", event.to_line())));
        }
        let (log, temporary) = match &self.log {
            Some(path) => (Log::create(path)?, None),
            None => {
                let file = NamedTempFile::with_prefix("dirtyscope-").context("make a log")?;
                (Log::create(file.path())?, Some(file))
            }
        };
        let log = Arc::new(Mutex::new(log));
        let mut recorder = Recorder { log, sinks, begun: Instant::now(), _temporary: temporary };
        recorder.record(&Event::Run(Run {
            version: VERSION,
            engine: engine.into(),
            arguments: env::args().skip(1).collect(),
            kernel: release(),
            planned,
            skip,
        }))?;
        if let Some(driver) = other_driver() {
            let why = env::var("DRIVER_WHY").unwrap_or("rust_mdev_dma isn't loaded".into());
            let text = format!("driver: {driver}, because {why}");
            recorder.record(&Event::Progress { text })?;
        }
        Ok(recorder)
    }
}

/// The name of the driver if it is the one that has commands only.
pub fn other_driver() -> Option<String> {
    let found = MdevType::find().ok().filter(MdevType::has_commands_only)?;
    Some(found.driver().to_owned())
}

/// `uname -r`
pub(crate) fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Keeps events, and hands them on to those who print them.
pub struct Recorder {
    log: Arc<Mutex<Log>>,
    sinks: Vec<Sink>,
    /// When the test in progress began.
    begun: Instant,
    /// The log's file, if it goes with the run.
    _temporary: Option<NamedTempFile>,
}

impl Recorder {
    /// The log, for what happens in a test.
    pub fn log(&self) -> &Arc<Mutex<Log>> {
        &self.log
    }

    /// Records an event, and lets all stay that were logged before.
    pub fn record(&mut self, event: &Event) -> Result<()> {
        {
            let mut log = lock(&self.log);
            log.append(event)?;
            log.keep();
        }
        self.deliver()
    }

    fn deliver(&mut self) -> Result<()> {
        let events = lock(&self.log).read()?;
        for event in &events {
            for sink in &mut self.sinks {
                sink(event).context("print results")?;
            }
        }
        Ok(())
    }

    /// Hands on what a worker has logged that stays.
    pub fn follow(&mut self) -> Result<()> {
        lock(&self.log).take_over()?;
        self.deliver()
    }

    /// What a worker has logged that doesn't stay yet.
    pub fn rest(&self) -> Result<Vec<Event>> {
        lock(&self.log).rest()
    }

    /// The file of the log.
    pub fn log_path(&self) -> PathBuf {
        lock(&self.log).path().to_owned()
    }

    /// Records what the kernel has logged. Returns its complaints. That messages were lost is one: it
    /// may have been among them.
    pub fn complaints(&mut self, messages: &mut Messages) -> Result<Vec<String>> {
        let messages = match messages.read() {
            Ok(messages) => messages,
            Err(error) => return Ok(vec![format!("{error:#}")]),
        };
        let mut complaints = Vec::new();
        for message in messages {
            if message.complaint {
                complaints.push(message.text.clone());
            }
            self.record(&Event::Kernel(message))?;
        }
        Ok(complaints)
    }

    /// A test begins.
    pub fn begin(&mut self, name: &str, about: &str) -> Result<()> {
        self.begun = Instant::now();
        self.record(&Event::Begin(Begin { name: name.into(), about: about.into() }))
    }

    /// It has ended.
    pub fn result(&mut self, name: &str, verdict: Verdict) -> Result<()> {
        let seconds = self.begun.elapsed().as_millis() as f64 / 1e3;
        self.record(&Event::Result(TestResult { name: name.into(), verdict, seconds }))
    }

    /// All tests have ended, or the user has stopped them.
    pub fn end(mut self, stopped: bool) -> Result<()> {
        self.record(&Event::End { stopped })
    }
}
