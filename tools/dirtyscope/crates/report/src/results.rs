// SPDX-License-Identifier: GPL-2.0-only

use crate::{junit::Junit, ktap::Printer, page::Page, totals::Totals};
use anyhow::{Context as _, Result};
use events::{Begin, EXIT_SKIP, Event, Run};
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

/// What comes of a run: on a terminal, and in the files of a directory.
pub struct Results<W: Write> {
    terminal: Printer<W>,
    files: Option<Files>,
    /// What is run, once it is known.
    run: Option<Run>,
    /// The test in progress.
    test: Option<Begin>,
    /// Complaints of the kernel that were recorded.
    complaints: Vec<String>,
    /// Whether the user has stopped it; if it has ended.
    end: Option<bool>,
}

/// Those that grow with the run, and those that are written at its end.
struct Files {
    directory: PathBuf,
    ktap: Printer<File>,
    events: BufWriter<File>,
    junit: Junit,
    page: Page,
}

impl Files {
    fn create(directory: &Path, published: Option<&Path>, name: Option<&str>) -> Result<Self> {
        let create = |file| {
            let path = directory.join(file);
            File::create(&path).with_context(|| format!("write {}", path.display()))
        };
        fs::create_dir_all(directory)
            .with_context(|| format!("make the directory {}", directory.display()))?;
        for stale in ["junit.xml", "report.html"] {
            let _ = fs::remove_file(directory.join(stale));
        }
        Ok(Self {
            directory: directory.to_owned(),
            ktap: Printer::new(create("results.ktap")?, false, published.map(Path::to_owned)),
            events: BufWriter::new(create("events.jsonl")?),
            junit: Junit::new(name),
            page: Page::new(name),
        })
    }

    fn event(&mut self, event: &Event) -> Result<()> {
        self.ktap.event(event)?;
        writeln!(self.events, "{}", event.to_line())?;
        self.junit.event(event);
        self.page.event(event);
        match event {
            Event::Saved { file, text } => write(&self.directory, file, text),
            Event::Result(_) => Ok(self.events.flush()?),
            _ => Ok(()),
        }
    }
}

/// Writes a file of the directory, and nowhere else.
fn write(directory: &Path, file: &str, text: &str) -> Result<()> {
    let path = directory.join(Path::new(file).file_name().context("a file without a name")?);
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))
}

impl<W: Write> Results<W> {
    /// Prints to `out`, which somebody watches or not, and writes files if there is a directory for
    /// them, where they are `published` for users. The run has a name, if not that of what is run.
    pub fn new(
        out: W,
        watched: bool,
        directory: Option<&Path>,
        published: Option<&Path>,
        name: Option<&str>,
    ) -> Result<Self> {
        let create = |directory| Files::create(directory, published, name);
        let files = directory.map(create).transpose()?;
        let saved_in = published.map(Path::to_owned);
        Ok(Self {
            terminal: Printer::new(out, watched, saved_in),
            files,
            run: None,
            test: None,
            complaints: Vec::new(),
            end: None,
        })
    }

    /// What is run, if it has begun.
    pub fn run(&self) -> Option<&Run> {
        self.run.as_ref()
    }

    /// The test that has begun and has no result.
    pub fn test(&self) -> Option<&Begin> {
        self.test.as_ref()
    }

    /// What the kernel has complained of, as far as it was recorded.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// How many tests ended how.
    pub fn totals(&self) -> &Totals {
        self.terminal.totals()
    }

    /// Whether the run said that the user had stopped it.
    pub fn stopped(&self) -> bool {
        self.end == Some(true)
    }

    /// Takes an event.
    pub fn event(&mut self, mut event: Event) -> Result<()> {
        match &mut event {
            Event::Run(run) => {
                // One more, for what belongs to none of the others.
                run.planned += usize::from(run.skip.is_none());
                self.run = Some(run.clone());
            }
            Event::Begin(begin) => self.test = Some(begin.clone()),
            Event::Result(_) => self.test = None,
            Event::Kernel(kernel) if kernel.complaint => self.complaints.push(kernel.text.clone()),
            // There may be more to say before.
            &mut Event::End { stopped } => {
                self.end = Some(stopped);
                return Ok(());
            }
            _ => {}
        }
        self.record(&event)
    }

    fn record(&mut self, event: &Event) -> Result<()> {
        self.terminal.event(event).context("print results")?;
        self.files.as_mut().map_or(Ok(()), |files| files.event(event))
    }

    /// Writes what is still to be written, and how many tests ended how. Returns the exit
    /// status that this is.
    pub fn end(mut self) -> Result<(W, u8)> {
        if let Some(stopped) = self.end {
            self.record(&Event::End { stopped })?;
        }
        self.terminal.end()?;
        let missing = self.terminal.missing();
        if let Some(mut files) = self.files {
            files.ktap.end()?;
            files.events.flush()?;
            write(&files.directory, "report.html", &files.page.to_html())?;
            write(&files.directory, "junit.xml", &files.junit.into_xml(missing)?)?;
        }
        let skipped = self.run.as_ref().is_some_and(|run| run.skip.is_some());
        let (out, failed) = self.terminal.close(usize::from(skipped))?;
        let code = match failed {
            0 => 0,
            1 if skipped => EXIT_SKIP,
            _ => 1,
        };
        Ok((out, code))
    }
}
