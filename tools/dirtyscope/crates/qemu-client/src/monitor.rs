// SPDX-License-Identifier: GPL-2.0-only

use crate::{Error, Result};
use qapi::{
    Command, ExecuteError, Qmp, Stream,
    qmp::{
        self, DirtyRateMeasureMode, MigrateSetParameters, MigrationCapability,
        MigrationCapabilityStatus, RunState,
    },
};
use serde::{Deserialize, Serialize};
use std::{
    cell::RefCell,
    io::{self, BufReader},
    os::unix::net::UnixStream,
};

/// Milliseconds of downtime that are always enough.
const ANY_DOWNTIME: u64 = 2_000_000;

/// `MigrationStatus` of QEMU's `qapi/migration.json`, as far as live migration has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// There was none.
    None,
    /// It begins.
    Setup,
    /// In pre-copy.
    Active,
    /// The machine is stopped, and it waits for [`Monitor::migrate_continue`].
    PreSwitchover,
    /// The machine is stopped, and the devices' state is sent.
    Device,
    /// The machine is at the destination.
    Completed,
    /// It is being cancelled.
    Cancelling,
    /// It was cancelled; the machine goes on at the source.
    Cancelled,
    /// It is about to have failed.
    Failing,
    /// It has failed; the machine goes on at the source.
    Failed,
    /// Something else.
    #[serde(other)]
    Other,
}

/// How a migration stands.
#[derive(Clone, Debug)]
pub struct Migration {
    /// What it is doing.
    pub status: MigrationStatus,
    /// How often QEMU has asked who wrote what.
    pub dirty_syncs: u64,
    /// Bytes of memory and devices that were sent.
    pub transferred: u64,
    /// Bytes of memory that are still to be sent, as far as QEMU knows.
    pub remaining: u64,
    /// Milliseconds from stop to completion.
    pub downtime: Option<u64>,
    /// Bytes of the VFIO devices' state that were sent.
    pub device_state: Option<u64>,
    /// Why it failed.
    pub error: Option<String>,
}

/// `query-migrate`, of whose answer the crate's schema doesn't know all that newer QEMUs say.
#[derive(Serialize)]
struct QueryMigrate {}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MigrationInfo {
    status: Option<MigrationStatus>,
    ram: Option<MigrationStats>,
    vfio: Option<VfioStats>,
    downtime: Option<u64>,
    error_desc: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MigrationStats {
    dirty_sync_count: u64,
    transferred: u64,
    remaining: u64,
}

#[derive(Deserialize)]
struct VfioStats {
    transferred: u64,
}

impl Command for QueryMigrate {
    type Ok = MigrationInfo;

    const NAME: &'static str = "query-migrate";
    const ALLOW_OOB: bool = false;
}

/// QEMU's monitor, spoken to in QMP.
pub struct Monitor {
    connection: RefCell<Qmp<Stream<BufReader<UnixStream>, UnixStream>>>,
}

impl Monitor {
    pub(crate) fn new(connection: UnixStream) -> Result<Self> {
        let lost = |source| Error::Lost { what: "QMP".into(), source };
        let reader = BufReader::new(connection.try_clone().map_err(lost)?);
        let mut qmp = Qmp::new(Stream::new(reader, connection));
        // The crate's own handshake() panics when the connection ends.
        if io::BufRead::fill_buf(qmp.inner_mut()).map_err(lost)?.is_empty() {
            return Err(lost(io::ErrorKind::UnexpectedEof.into()));
        }
        qmp.handshake().map_err(|error| failed("QMP handshake", error))?;
        Ok(Self { connection: RefCell::new(qmp) })
    }

    /// Whether the machine runs.
    pub fn run_state(&self) -> Result<RunState> {
        Ok(self.execute(&qmp::query_status {})?.status)
    }

    /// Lets the machine run.
    pub fn cont(&self) -> Result<()> {
        self.execute(&qmp::cont {}).map(drop)
    }

    /// Waits for a migration to come by `uri`, without ending when it fails.
    pub fn migrate_incoming(&self, uri: &str) -> Result<()> {
        let (uri, exit_on_error) = (Some(uri.into()), Some(false));
        self.execute(&qmp::migrate_incoming { uri, exit_on_error, channels: None }).map(drop)
    }

    /// Begins to migrate to `uri`.
    pub fn migrate(&self, uri: &str) -> Result<()> {
        let uri = Some(uri.into());
        self.execute(&qmp::migrate { uri, channels: None, detach: None, resume: None }).map(drop)
    }

    /// Ends a migration; the machine goes on here.
    pub fn migrate_cancel(&self) -> Result<()> {
        self.execute(&qmp::migrate_cancel {}).map(drop)
    }

    /// How the migration stands.
    pub fn migration(&self) -> Result<Migration> {
        let info = self.execute(&QueryMigrate {})?;
        let ram = info.ram.unwrap_or_default();
        Ok(Migration {
            status: info.status.unwrap_or(MigrationStatus::None),
            dirty_syncs: ram.dirty_sync_count,
            transferred: ram.transferred,
            remaining: ram.remaining,
            downtime: info.downtime,
            device_state: info.vfio.map(|vfio| vfio.transferred),
            error: info.error_desc,
        })
    }

    /// Keeps migrations in pre-copy: whatever is left is too much for the downtime.
    pub fn hold_pre_copy(&self) -> Result<()> {
        self.set_downtime(0)
    }

    /// Lets migrations complete: whatever is left is little enough.
    pub fn end_pre_copy(&self) -> Result<()> {
        self.set_downtime(ANY_DOWNTIME)
    }

    /// Whether migrations wait, when the machine is stopped, until they are told to go on.
    pub fn pause_before_switchover(&self, pause: bool) -> Result<()> {
        self.set_capabilities(&[MigrationCapability::pause_before_switchover], pause)
    }

    /// Turns capabilities of migrations on or off; some must be the same at both ends.
    pub fn set_capabilities(&self, which: &[MigrationCapability], state: bool) -> Result<()> {
        let status = |&capability| MigrationCapabilityStatus { capability, state };
        let capabilities = which.iter().map(status).collect();
        self.execute(&qmp::migrate_set_capabilities { capabilities }).map(drop)
    }

    /// Resets the machine as its reset button does.
    pub fn system_reset(&self) -> Result<()> {
        self.execute(&qmp::system_reset {}).map(drop)
    }

    /// Measures for so many seconds how much is written, by the dirty bitmaps that migrations use.
    pub fn calc_dirty_rate(&self, seconds: i64) -> Result<()> {
        let mode = Some(DirtyRateMeasureMode::dirty_bitmap);
        let (calc_time_unit, sample_pages) = (None, None);
        let calc = qmp::calc_dirty_rate { calc_time_unit, mode, sample_pages, calc_time: seconds };
        self.execute(&calc).map(drop)
    }

    /// What was measured last, in MiB a second; none until then.
    pub fn dirty_rate(&self) -> Result<Option<i64>> {
        Ok(self.execute(&qmp::query_dirty_rate { calc_time_unit: None })?.dirty_rate)
    }

    /// Lets the machine run at the destination, and fetch there what is missing of its memory.
    pub fn start_postcopy(&self) -> Result<()> {
        self.execute(&qmp::migrate_start_postcopy {}).map(drop)
    }

    /// Adds a device, with these properties, `id` and `bus` among them.
    pub fn add_device(&self, driver: &str, properties: &[(&str, &str)]) -> Result<()> {
        let arguments = properties.iter().map(|&(name, value)| (name.into(), value.into()));
        let (driver, arguments) = (driver.into(), arguments.collect());
        self.execute(&qmp::device_add { driver, bus: None, id: None, arguments }).map(drop)
    }

    /// Asks the guest to let go of a device; it is there until the guest has done so.
    pub fn remove_device(&self, id: &str) -> Result<()> {
        self.execute(&qmp::device_del { id: id.into() }).map(drop)
    }

    /// Whether there is a device with this id.
    pub fn has_device(&self, id: &str) -> Result<bool> {
        let devices = self.execute(&qmp::qom_list { path: "/machine/peripheral".into() })?;
        Ok(devices.iter().any(|device| device.name == id))
    }

    /// Lets a migration go on that waits.
    pub fn migrate_continue(&self) -> Result<()> {
        let state = qmp::MigrationStatus::pre_switchover;
        self.execute(&qmp::migrate_continue { state }).map(drop)
    }

    /// Has migrations send so many bytes a second, until [`Monitor::end_pre_copy`].
    pub fn limit_bandwidth(&self, bytes: u64) -> Result<()> {
        let max_bandwidth = Some(bytes);
        self.set_parameters(MigrateSetParameters { max_bandwidth, ..Default::default() })
    }

    fn set_downtime(&self, milliseconds: u64) -> Result<()> {
        self.set_parameters(MigrateSetParameters {
            downtime_limit: Some(milliseconds),
            // As fast as it can.
            max_bandwidth: Some(0),
            ..Default::default()
        })
    }

    fn set_parameters(&self, parameters: MigrateSetParameters) -> Result<()> {
        self.execute(&qmp::migrate_set_parameters(parameters)).map(drop)
    }

    fn execute<C: Command>(&self, command: &C) -> Result<C::Ok> {
        let mut qmp = self.connection.borrow_mut();
        let answer = qmp.execute(command).map_err(|error| failed(C::NAME, error));
        // Nobody waits for events: what they say is asked for.
        drop(qmp.events());
        answer
    }
}

fn failed(command: &str, error: ExecuteError) -> Error {
    let what = format!("QMP {command}");
    match error {
        ExecuteError::Qapi(error) => Error::Refused { what, answer: error.desc },
        ExecuteError::Io(source) => Error::Lost { what, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{BufRead, Write},
        thread,
    };

    /// A monitor that answers each command by the next line of `answers`.
    fn monitor(answers: &'static [&'static str]) -> Monitor {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut commands = BufReader::new(theirs.try_clone().unwrap());
            let say = |line: &str| writeln!(&theirs, "{line}").unwrap();
            say(r#"{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11},
                "package": ""}, "capabilities": []}}"#
                .replace('\n', "")
                .as_str());
            for answer in [r#"{"return": {}}"#].iter().chain(answers) {
                commands.read_line(&mut String::new()).unwrap();
                say(answer);
            }
        });
        Monitor::new(ours).unwrap()
    }

    #[test]
    fn migrations() {
        let monitor = monitor(&[
            r#"{"return": {}}"#,
            r#"{"return": {"status": "failing", "error-desc": "why", "new-in-qemu-12": 1}}"#,
            r#"{"return": {"status": "new-in-qemu-12"}}"#,
        ]);
        assert_eq!(monitor.migration().unwrap().status, MigrationStatus::None);
        let migration = monitor.migration().unwrap();
        assert_eq!(migration.status, MigrationStatus::Failing);
        assert_eq!(migration.error.unwrap(), "why");
        assert_eq!(monitor.migration().unwrap().status, MigrationStatus::Other);
    }

    #[test]
    fn refusals_and_ends() {
        let monitor = monitor(&[r#"{"error": {"class": "GenericError", "desc": "not so"}}"#]);
        assert_eq!(monitor.cont().unwrap_err().to_string(), "QMP cont: not so");
        assert_eq!(monitor.cont().unwrap_err().to_string(), "QMP cont: QEMU has ended");
    }
}
