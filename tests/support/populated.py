"""An index with many made-up studies, written straight into its tables."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

from sqlalchemy import insert

from pacs.domain.fragments import series_fragment, study_fragment
from pacs.imaging.charset import normalise, pinyin_keys, split_person_name
from pacs.repository.tables import Instance, Patient, Series, Study
from storage.db.engine import Database
from storage.db.tables import Pack, Tenant

SURNAMES = "王李张刘陈杨黄赵周吴徐孙马朱胡林郭何高罗"
GIVEN = ("伟", "芳", "娜", "秀英", "敏", "静", "丽", "强", "磊", "军", "洋", "勇")
LATIN = ("Kim^Min", "Müller^Zoë", "Smith^John^Q", "Zhang^San", "Okafor^Ada", "O'Neil^P")
CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "US": "1.2.840.10008.5.1.4.1.1.6.1",
}


@dataclass(frozen=True, slots=True)
class Made:
    """One study as it was made; ``None`` date: the data set held no date."""

    tenant: str = "default"
    patient_id: str = "P1"
    issuer: str = ""
    name: str = "Test^One"
    study_date: str | None = "20240102"
    study_time: str | None = "103000"
    accession: str = "A1"
    referring: str = ""
    description: str = ""
    birth_date: str | None = "19700101"
    sex: str = "M"
    modalities: tuple[str, ...] = ("CT",)
    n_instances: int = 2
    uid: str = ""


def _spread(number: int, sides: int) -> int:
    """Return a die's throw that is always the same for `number`."""
    return (number * 2_654_435_761 >> 7) % sides


def many(n_studies: int, *, tenant: str = "default", seed: int = 7) -> list[Made]:
    """Return `n_studies` different studies, the same ones each time."""
    made = []
    for i in range(n_studies):
        if i % 4:
            surname = SURNAMES[_spread(i, len(SURNAMES))]
            hanzi = f"{surname}^{GIVEN[_spread(i + 1, len(GIVEN))]}"
            name = hanzi if i % 8 == 1 else f"={hanzi}"
        else:
            name = f"{LATIN[_spread(i, len(LATIN))]}{i % 97:02d}"
        day = date(2015, 1, 1) + timedelta(days=_spread(i + 2, 3600))
        made.append(
            Made(
                tenant=tenant,
                patient_id=f"P{i // 2:06d}",
                name=name,
                study_date=None if i % 101 == 100 else f"{day:%Y%m%d}",
                study_time=f"{_spread(i, 24):02d}{_spread(i, 60):02d}00",
                accession=f"ACC{i:07d}",
                referring="Li^Si=李^四" if i % 3 else "Garcia^Ana",
                description=f"胸部CT平扫 {i}" if i % 2 else f"Knee 100%_{i}",
                modalities=(("CT",), ("CT", "SR"), ("MR",), ("DX",))[i % 4],
                n_instances=3,
                uid=f"1.2.826.0.1.{seed}.{i + 1}",
            )
        )
    return made


def populate(database: Database, studies: list[Made]) -> None:
    """Write patients, studies, series and instances as ingest would."""
    patients: dict[tuple[str, str, str], int] = {}
    rows: dict[str, list[dict[str, object]]] = {
        "patient": [], "study": [], "series": [], "instance": [],
    }  # fmt: skip
    for number, made in enumerate(studies, start=1):
        uid = made.uid or f"1.2.3.{number}"
        issuer = made.issuer if made.patient_id else f"~{uid}"
        key = (made.tenant, issuer, made.patient_id)
        if key not in patients:
            patients[key] = len(patients) + 1
            rows["patient"].append(_patient(made, patients[key], issuer))
        rows["study"].append(_study(made, number, patients[key], uid))
        for modality in made.modalities:
            series_pk = len(rows["series"]) + 1
            series_uid = f"{uid}.{series_pk}"
            rows["series"].append(
                _series(made, series_pk, number, modality, series_uid)
            )
            for i in range(made.n_instances):
                rows["instance"].append(
                    _instance(made, series_pk, series_uid, modality, i + 1)
                )
    with database.write() as connection:
        for tenant in sorted({made.tenant for made in studies}):
            connection.execute(insert(Tenant), {"key": tenant, "created_us": 1})
        connection.execute(
            insert(Pack),
            {
                "id": 1, "key": "p1", "tenant": "default", "kind": "log",
                "place": "local", "node_id": "node-1", "state": "closed",
                "size_bytes": 0, "created_us": 1,
            },
        )  # fmt: skip
        for table in (Patient, Study, Series, Instance):
            connection.execute(insert(table), rows[table.__tablename__])


def _patient(made: Made, pk: int, issuer: str) -> dict[str, object]:
    return {
        "id": pk, "tenant": made.tenant, "issuer": issuer,
        "patient_id": made.patient_id, "patient_name": made.name,
        "name_search": normalise(made.name), "birth_date": made.birth_date,
        "sex": made.sex, "created_us": 1,
    }  # fmt: skip


def _study(made: Made, pk: int, patient_pk: int, uid: str) -> dict[str, object]:
    groups = split_person_name(made.name)
    fragment = study_fragment(
        study_date=made.study_date or "",
        study_time=made.study_time or "",
        accession_number=made.accession,
        referring_physician_name=made.referring,
        timezone_offset="",
        patient_name=made.name,
        patient_id=made.patient_id,
        issuer=made.issuer,
        birth_date=made.birth_date or "",
        sex=made.sex,
        study_instance_uid=uid,
        study_id="",
        study_description=made.description,
        has_charset=True,
    )
    n_instances = made.n_instances * len(made.modalities)
    return {
        "id": pk, "tenant": made.tenant, "patient_pk": patient_pk,
        "study_instance_uid": uid, "study_date": made.study_date,
        "study_time": made.study_time, "accession_number": made.accession,
        "study_id": "", "study_description": made.description,
        "referring_physician_name": made.referring,
        "referring_search": normalise(made.referring), "timezone_offset": "",
        "patient_id": made.patient_id, "issuer": made.issuer,
        "patient_name": made.name, "name_alphabetic": normalise(groups[0]),
        "name_ideographic": normalise(groups[1]),
        "name_phonetic": normalise(groups[2]), "name_pinyin": pinyin_keys(made.name),
        "birth_date": made.birth_date, "sex": made.sex,
        "modalities": "\\".join(sorted(made.modalities)),
        "sop_classes": "\\".join(
            sorted(CLASSES.get(m, CLASSES["CT"]) for m in made.modalities)
        ),
        "n_series": len(made.modalities), "n_instances": n_instances,
        "size_bytes": 1000 * n_instances, "json": fragment, "origin": "external",
        "flags": 0, "version": 0, "created_us": pk, "updated_us": pk,
    }  # fmt: skip


def _series(
    made: Made, pk: int, study_pk: int, modality: str, uid: str
) -> dict[str, object]:
    fragment = series_fragment(
        modality=modality,
        series_description=f"{modality} axial",
        series_instance_uid=uid,
        series_number=pk % 7 or None,
        body_part="CHEST",
        laterality="",
        station_name="CT01",
        institution_name="互影医院",
        pps_start_date="20240102",
        pps_start_time="103000",
        request_attributes=[
            {"ScheduledProcedureStepID": "S1", "RequestedProcedureID": "R1"}
        ],
    )
    return {
        "id": pk, "tenant": made.tenant, "study_pk": study_pk,
        "series_instance_uid": uid, "modality": modality,
        "series_number": pk % 7 or None, "series_description": f"{modality} axial",
        "body_part": "CHEST", "laterality": "", "station_name": "CT01",
        "institution_name": "互影医院", "pps_start_date": "20240102",
        "pps_start_time": "103000", "scheduled_step_id": "S1",
        "requested_procedure_id": "R1", "n_instances": made.n_instances,
        "size_bytes": 1000 * made.n_instances, "json": fragment,
        "sealed_version": 0, "revision": 0, "created_us": 1, "updated_us": 1,
    }  # fmt: skip


def _instance(
    made: Made, series_pk: int, series_uid: str, modality: str, number: int
) -> dict[str, object]:
    return {
        "tenant": made.tenant, "series_pk": series_pk,
        "sop_instance_uid": f"{series_uid}.{number}",
        "sop_class_uid": CLASSES.get(modality, CLASSES["CT"]),
        "transfer_syntax_uid": "1.2.840.10008.1.2.1", "instance_number": number,
        "rows": 512, "columns": 512, "bits_allocated": 16, "samples": 1,
        "number_of_frames": 1, "digest": bytes(32), "pack_pk": 1,
        "record_offset": 0, "object_offset": 0, "object_length": 1000,
        "dataset_offset": 0, "header_end": 500, "flags": 0, "received_us": 1,
    }  # fmt: skip
