{{/* Names: KubeRay adds up to 22 characters to the service's. */}}
{{- define "peregrine.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "peregrine.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "peregrine.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "peregrine.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* What selects: never changes over a release's life. Pods carry these and no version, for which KubeRay
would start a new cluster at every release of the chart; nor app.kubernetes.io/name, by whose value of its own
KubeRay's service for the head finds its pod. */}}
{{- define "peregrine.selectorLabels" -}}
app.kubernetes.io/part-of: peregrine
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "peregrine.labels" -}}
{{ include "peregrine.selectorLabels" . }}
app.kubernetes.io/name: {{ include "peregrine.name" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "peregrine.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "peregrine.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "peregrine.fullname" .) }}
{{- else }}
{{- .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{/* KubeRay makes this service. */}}
{{- define "peregrine.serveService" -}}
{{ include "peregrine.fullname" . }}-serve-svc
{{- end }}

{{- define "peregrine.isOnGpu" -}}
{{- if eq .Values.config.engine.device "cuda" }}true{{ end }}
{{- end }}

{{- define "peregrine.isPrefetched" -}}
{{- if and .Values.modelCache.enabled (or .Values.modelCache.prefetch.enabled .Values.modelCache.quantize.bits) }}true{{ end }}
{{- end }}

{{/* From the longest stream on: a pod's grace period, and an old cluster's life. */}}
{{- define "peregrine.drainSeconds" -}}
{{- add (ceil .Values.config.serving.request_timeout_s) 30 .Values.drainMarginSeconds }}
{{- end }}

{{/* Then each Ray cluster has a service of its own, and none bears the RayService's name. */}}
{{- define "peregrine.isIncremental" -}}
{{- if eq .Values.upgrade.strategy "NewClusterWithIncrementalUpgrade" }}true{{ end }}
{{- end }}

{{- define "peregrine.testUrl" -}}
{{- if .Values.test.url }}{{ .Values.test.url }}
{{- else if not (include "peregrine.isIncremental" .) -}}
http://{{ include "peregrine.serveService" . }}.{{ .Release.Namespace }}.svc:{{ .Values.config.cluster.port }}
{{- end }}
{{- end }}
