// SPDX-License-Identifier: GPL-2.0-or-later
// Draws the dashboard as Grafana does: its own components, given the dashboard's JSON and Prometheus' answers.
//
// What the components do not do themselves is the work of Grafana's panel plugins, which no package has: to turn
// answers into data frames, to run transformations, to apply the field configuration. Here it is done by the functions
// of @grafana/data that the plugins call too; nothing about how a value looks is decided here.

import {
  applyFieldOverrides, cacheFieldDisplayNames, createTheme, DataFrame, dateTime, FieldConfigOptionsRegistry, FieldConfigPropertyItem, FieldType,
  getFieldDisplayValues, getValueFormats, identityOverrideProcessor, renderTextPanelMarkdown, standardTransformers,
  standardTransformersRegistry, ThemeContext, transformDataFrame,
} from '@grafana/data';
import { BigValue, GlobalStyles, PanelChrome, PortalContainer, TimeSeries, VizRepeater } from '@grafana/ui';
import { TableNG } from '@grafana/ui/unstable';
import React from 'react';
import { createRoot } from 'react-dom/client';
import { lastValueFrom } from 'rxjs';

type Series = { metric: Record<string, string>; values?: [number, string][]; value?: [number, string] };
declare const INPUT: {
  panels: any[]; answers: Record<string, Record<string, Series[]>>; start: number; end: number; step: number;
};

const CELL = 30, GAP = 8; // a unit of gridPos and the space between panels, in pixels, as in Grafana
const theme = createTheme({ colors: { mode: location.search === '?dark' ? 'dark' : 'light' } });
const timeRange = {
  from: dateTime(INPUT.start * 1000), to: dateTime(INPUT.end * 1000), raw: { from: 'now-1h', to: 'now' },
};

/** How a series is called in a legend: Prometheus' `legendFormat`. */
function legend(format: string, labels: Record<string, string>): string | undefined {
  return format === '__auto' ? undefined : format.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => labels[name] ?? '');
}

function timeSeries(target: any, answer: Series[]): DataFrame[] {
  return answer.map(({ metric, values, value }) => {
    const found = new Map((values ?? [value!]).map(([when, text]) => [when, Number(text)]));
    const times = values ? steps() : [value![0]];
    const numbers = times.map((when) => found.get(when) ?? null); // a gap is a gap
    return {
      refId: target.refId,
      length: times.length,
      fields: [
        { name: 'Time', type: FieldType.time, config: {}, values: times.map((when) => when * 1000) },
        {
          name: 'Value', type: FieldType.number, labels: metric, values: numbers,
          config: { displayNameFromDS: legend(target.legendFormat, metric) },
        },
      ],
    };
  });
}

function steps(): number[] {
  const count = Math.floor((INPUT.end - INPUT.start) / INPUT.step) + 1;
  return Array.from({ length: count }, (_, index) => INPUT.start + index * INPUT.step);
}

function table(target: any, answer: Series[]): DataFrame {
  const labels = [...new Set(answer.flatMap(({ metric }) => Object.keys(metric)))].sort();
  const field = (name: string, type: FieldType, values: unknown[]) => ({ name, type, config: {}, values });
  return {
    refId: target.refId,
    length: answer.length,
    fields: [
      field('Time', FieldType.time, answer.map(({ value }) => value![0] * 1000)),
      ...labels.map((name) => field(name, FieldType.string, answer.map(({ metric }) => metric[name] ?? ''))),
      field(`Value #${target.refId}`, FieldType.number, answer.map(({ value }) => Number(value![1]))),
    ],
  };
}

const STANDARD = ['unit', 'decimals', 'min', 'max', 'displayName', 'noValue', 'mappings', 'thresholds', 'color', 'links'];
const UNITS = new Set(getValueFormats().flatMap(({ submenu }) => submenu!.map(({ value }) => value)));

/** Every option of a field that the panel's JSON sets: those of Grafana by name, those of the panel's kind under custom. */
function options(fieldConfig: any): FieldConfigOptionsRegistry {
  const known = Object.keys(fieldConfig.defaults).filter((id) => id !== 'custom' && !STANDARD.includes(id));
  const overrides: string[] = fieldConfig.overrides.flatMap((one: any) => one.properties.map(({ id }: any) => id));
  const wrong = [...known, ...overrides.filter((id) => !id.startsWith('custom.') && !STANDARD.includes(id))];
  if (wrong.length) {
    throw new Error(`no such options of a field: ${wrong}`);
  }
  const units = [fieldConfig.defaults.unit, ...fieldConfig.overrides.flatMap(
    (one: any) => one.properties.filter(({ id }: any) => id === 'unit').map(({ value }: any) => value))];
  const unknown = units.filter((unit) => unit !== undefined && !UNITS.has(unit));
  if (unknown.length) {
    throw new Error(`no such units: ${unknown}`);
  }
  const custom = Object.keys(fieldConfig.defaults.custom ?? {}).map((name) => `custom.${name}`);
  const ids = [...new Set([...STANDARD, ...custom, ...overrides])];
  return new FieldConfigOptionsRegistry(() => ids.map((id) => ({
    id, name: id, path: id.replace(/^custom\./, ''), isCustom: id.startsWith('custom.'),
    process: identityOverrideProcessor, shouldApply: () => true, settings: {}, editor: null, override: null,
  } as unknown as FieldConfigPropertyItem)));
}

async function frames(panel: any): Promise<DataFrame[]> {
  const answers = INPUT.answers[panel.id];
  let data: DataFrame[] = panel.targets.flatMap((target: any) => {
    const answer = answers[target.refId] ?? [];
    return target.format === 'table' ? (answer.length ? [table(target, answer)] : []) : timeSeries(target, answer);
  });
  if (panel.transformations) {
    data = await lastValueFrom(transformDataFrame(panel.transformations, data));
  }
  data = applyFieldOverrides({
    data, theme, timeZone: 'utc', fieldConfig: panel.fieldConfig, fieldConfigRegistry: options(panel.fieldConfig),
    replaceVariables: (text: string) => text,
  });
  cacheFieldDisplayNames(data);
  return data;
}

function Empty({ panel }: { panel: any }) {
  return <div className="empty" style={{ display: 'grid', placeItems: 'center', height: '100%' }}>
    {panel.fieldConfig.defaults.noValue ?? 'No data'}
  </div>;
}

const KINDS: Record<string, (panel: any, data: DataFrame[], width: number, height: number) => React.ReactNode> = {
  text: (panel) => <div
    className="markdown-html" style={{ overflow: 'auto', height: '100%' }}
    dangerouslySetInnerHTML={{ __html: renderTextPanelMarkdown(panel.options.content) }}
  />,
  stat: (panel, data, width, height) => <VizRepeater
    width={width} height={height} source={data} orientation={panel.options.orientation} renderCounter={0}
    getValues={() => getFieldDisplayValues({
      data, theme, fieldConfig: panel.fieldConfig, reduceOptions: panel.options.reduceOptions, timeZone: 'utc',
      replaceVariables: (text: string) => text, sparkline: panel.options.graphMode !== 'none',
    })}
    renderValue={({ value, width: w, height: h }: any) => <BigValue
      value={value.display} width={w} height={h} theme={theme} colorMode={panel.options.colorMode}
      graphMode={panel.options.graphMode} justifyMode={panel.options.justifyMode} textMode={panel.options.textMode}
    />}
  />,
  timeseries: (panel, data, width, height) => data.length === 0 ? <Empty panel={panel} /> : <TimeSeries
    frames={data} width={width} height={height} timeRange={timeRange} timeZone="utc" legend={panel.options.legend}
    options={panel.options}
  />,
  table: (panel, data, width, height) => data.length === 0 ? <Empty panel={panel} /> : <TableNG
    data={data[panel.options.frameIndex]} width={width} height={height} noHeader={!panel.options.showHeader}
    sortBy={panel.options.sortBy} cellHeight={panel.options.cellHeight} fieldConfig={panel.fieldConfig}
    timeRange={timeRange} enableVirtualization={false} structureRev={1}
  />,
};

function Panel({ panel, data, cell }: { panel: any; data: DataFrame[]; cell: number }) {
  const { x, y, w, h } = panel.gridPos;
  const width = w * cell - GAP, height = h * (CELL + GAP) - GAP;
  const place: React.CSSProperties = {
    position: 'absolute', left: x * cell + GAP, top: y * (CELL + GAP) + GAP, width, height,
  };
  if (panel.type === 'row') {
    return <div style={{ ...place, font: '500 16px sans-serif', lineHeight: `${height}px` }}>⌄ {panel.title}</div>;
  }
  return <div id={`panel-${panel.id}`} className="panel" style={place}>
    <PanelChrome title={panel.title} description={panel.description} width={width} height={height}>
      {(innerWidth, innerHeight) => KINDS[panel.type](panel, data, innerWidth, innerHeight)}
    </PanelChrome>
  </div>;
}

async function draw() {
  standardTransformersRegistry.setInit(() => ['merge', 'filterFieldsByName', 'organize'].map((id) => {
    const transformation = Object.values(standardTransformers).find((one: any) => one.id === id)!;
    return { id, name: id, transformation: async () => transformation, editor: () => null } as any;
  }));
  const panels = INPUT.panels;
  const data = await Promise.all(panels.map((panel) => (panel.targets ? frames(panel) : [])));
  const rows = Math.max(...panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  const cell = (document.documentElement.clientWidth - GAP) / 24;
  const style = { position: 'relative', height: rows * (CELL + GAP) + GAP } as React.CSSProperties;
  document.body.style.background = theme.colors.background.canvas;
  createRoot(document.getElementById('page')!).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles isExtensionSidebarOpen={false} />
      <div style={style}>
        {panels.map((panel, index) => <Panel key={panel.id} panel={panel} data={data[index]} cell={cell} />)}
      </div>
      <PortalContainer />
    </ThemeContext.Provider>
  );
}

draw().then(() => document.body.setAttribute('data-drawn', 'yes'), (error) => {
  document.body.setAttribute('data-drawn', String(error.stack ?? error));
});
